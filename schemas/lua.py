"""The parts of the atomic scripts that both sides share: how a run ends is one thing, whoever ends it.

The text is prepended to the scripts of `consumer` and `producer`; it holds local functions only. Keys come in by name,
times are milliseconds of the server's clock.
"""

from schemas.keys import ENDED_MAX_ENTRIES, PROGRESS_MAX_ENTRIES, PROGRESS_TTL_SECONDS

CLOCK = """
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
"""

IS_TERMINAL = """
local function is_terminal(state)
  return state == 'succeeded' or state == 'failed' or state == 'cancelled'
end
"""

# Called only after the script has removed the job from where it waited (XDEL, ZREM): at maxmemory Redis refuses a
# script whose first write is an XADD, and lets one go on that has already freed something.
# `tenant` is in the hash of a run that was counted when it was accepted; the next run has a hash of its own.
END_RUN = f"""
local function end_run(job, cancel, progress, completions, ended, tenants, run)
  local tenant = redis.call('HGET', job, 'tenant')
  redis.call('HSET', job, 'state', run.state, 'event', run.event, 'ended_at', now_ms(), 'payload', run.payload,
    'consumer', '')
  redis.call('PEXPIRE', job, run.ttl_ms)
  redis.call('DEL', cancel)
  redis.call('XADD', completions, '*', 'type', run.type, 'job_id', run.job_id, 'payload', run.event)
  redis.call('XADD', progress, 'MAXLEN', '~', {PROGRESS_MAX_ENTRIES}, '*',
    'type', run.type, 'job_id', run.job_id, 'payload', run.event)
  redis.call('PEXPIRE', progress, math.min({PROGRESS_TTL_SECONDS * 1000}, tonumber(run.ttl_ms)))
  redis.call('LPUSH', ended, now_ms())
  redis.call('LTRIM', ended, 0, {ENDED_MAX_ENTRIES - 1})
  if tenant and redis.call('HINCRBY', tenants, tenant, -1) <= 0 then redis.call('HDEL', tenants, tenant) end
end
"""

PRELUDE = CLOCK + IS_TERMINAL + END_RUN

# Removes the names of a group that hold nothing and have been silent for so long: each start of a process brings one,
# and a process that is killed leaves it. A live one that is removed is there again with its next read.
FORGET_IDLE_NAMES = """
local stream, group, idle_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local forgotten = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local info = {}
  for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
  if info['pending'] == 0 and info['idle'] >= idle_ms then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, info['name'])
    forgotten = forgotten + 1
  end
end
return forgotten
"""

# Trims a stream to what some group has not acknowledged; with no group, not at all. Returns the name of the group that
# is furthest behind, '' where there is none, and how many entries went.
TRIM = """
local function earlier(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end

local function trim(stream)
  local slowest = nil
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = {}
    for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
    local needs = info['last-delivered-id']
    local pending = redis.call('XPENDING', stream, info['name'])
    if pending[1] > 0 then needs = pending[2] end
    if slowest == nil or earlier(needs, slowest.needs) then slowest = {name = info['name'], needs = needs} end
  end
  if slowest == nil then return '', 0 end
  return slowest.name, redis.call('XTRIM', stream, 'MINID', slowest.needs)
end
"""

# Trims the completions that every group has acknowledged; with no group, none. Returns how many went.
TRIM_COMPLETIONS = (
    TRIM
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local _, trimmed = trim(KEYS[1])
return trimmed
"""
)
