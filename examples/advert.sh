#!/usr/bin/env bash
# An advert on record, from its image to both verdicts. Beside a running server: bash examples/advert.sh
set -euo pipefail
cd "$(dirname "$0")/.."
api=${DURE_URL:-http://127.0.0.1:8000}/api/yh

ask() { # prints the answer; an error goes to stderr and ends the script
  local answer
  answer=$(curl --silent --show-error --fail-with-body --max-time 60 "$@") || { echo "$answer" >&2; return 1; }
  echo "$answer"
}

field() { # a field of JSON that holds text: field NAME JSON
  grep -o "\"$1\":\"[^\"]*" <<<"$2" | cut -d'"' -f4
}

echo "# A job with its image"
created=$(ask "$api/jobs" -H 'Idempotency-Key: mug-1' -F tenant_id=example \
  -F image=@demo/adverts/examples/red-mug.png -F 'desc_eng=A red mug for slow mornings')
echo "$created"
job=$(field job_id "$created")
variant=$(field job_variants_id "$created")
ids="{\"tenant_id\": \"example\", \"job_id\": \"$job\", \"job_variants_id\": \"$variant\"}"

echo "# Stage 1: does the image fit the copy?"
ask "$api/llava/stage1/validate" -H 'Content-Type: application/json' -d "$ids"

echo "# The finished advert"
ask "$api/jobs/$job/variants/$variant/overlay" -F tenant_id=example -F image=@demo/adverts/examples/good-advert.png

echo "# Stage 2: is it good?"
ask "$api/llava/stage2/judge" -H 'Content-Type: application/json' -d "$ids"

echo "# What is on record"
ask "$api/jobs/$job?tenant_id=example"
ask "$api/traces?tenant_id=example&job_id=$job"
ask "$api/events?tenant_id=example&state=dead"

echo "# The job's events so far; the stream would go on"
curl --silent --no-buffer --max-time 2 "$api/jobs/$job/events?tenant_id=example" || true

echo "# Delete it: rows and files"
ask -X DELETE "$api/jobs/$job?tenant_id=example"
