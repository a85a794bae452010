-- A body that no server has seen before, for each request of each thread. In the template the word NUMBER becomes a
-- number, and each TEXT becomes SHORTEST to LONGEST words of a file, drawn alike for every server.
-- Called as: wrk -s fresh.lua URL -- BODY [WORDS_FILE SHORTEST LONGEST]
local POOL = 2048 -- word strings made before the first request; a text is three counting words and one of these
local COUNTING = 3

local body, counter, seed
local words, pool

function setup(thread)
  seed = (seed or 0) + 1
  thread:set("number", seed)
end

function init(arguments)
  body = arguments[1]
  counter = number * 1000000000 + os.time() % 100000 * 10000
  if arguments[2] then
    math.randomseed(number)
    words = read(arguments[2])
    pool = fill(tonumber(arguments[3]) - COUNTING, tonumber(arguments[4]) - COUNTING)
  end
end

function read(path)
  local found = {}
  for line in io.lines(path) do
    for word in line:gmatch("%S+") do found[#found + 1] = word end
  end
  return found
end

function fill(shortest, longest)
  local strings = {}
  for entry = 1, POOL do
    local drawn = {}
    for place = 1, math.random(shortest, longest) do drawn[place] = words[math.random(#words)] end
    strings[entry] = table.concat(drawn, " ")
  end
  return strings
end

local function text()
  counter = counter + 1
  local count, size = counter, #words
  local first = words[count % size + 1]
  count = math.floor(count / size)
  local second = words[count % size + 1]
  count = math.floor(count / size)
  return first .. " " .. second .. " " .. words[count % size + 1] .. " " .. pool[math.random(POOL)]
end

function request()
  counter = counter + 1
  local fresh = body:gsub("NUMBER", tostring(counter))
  if pool then fresh = fresh:gsub("TEXT", text) end
  return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, fresh)
end

function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  -- Answers wait for the engine and refusals do not, so the p99 of refusals is found among the fastest responses.
  local refused = math.max(0.001, math.min(99, 99 * failed / math.max(summary.requests, 1)))
  print(string.format("RESULT %d %d %.1f %.1f %.1f %d", summary.requests, summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency:percentile(refused) / 1000, failed))
end
