-- A body that no server has seen before, for each request of each thread: the word WORDn in the template becomes a number.
-- Called as: wrk -s fresh.lua URL -- BODY
local body, counter, seed

function setup(thread)
  seed = (seed or 0) + 1
  thread:set("number", seed)
end

function init(arguments)
  body = arguments[1]
  counter = number * 1000000000 + os.time() % 100000 * 10000
end

function request()
  counter = counter + 1
  local fresh = body:gsub("NUMBER", tostring(counter))
  return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, fresh)
end

function done(summary, latency, requests)
  local errors = summary.errors
  print(string.format("RESULT %d %d %.1f %.1f %d", summary.requests, summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
