"""The backend's atomic steps, as Lua for Redis 6.2 and newer. Each may be sent twice and recognises its own work."""

from schemas.lua import IS_TERMINAL, PRELUDE, TRIM

DRAIN_WINDOW_MS = 600_000

_ENQUEUE = """
local function depth(streams, delayed)
  local waiting = redis.call('ZCARD', delayed)
  for _, stream in ipairs(streams) do waiting = waiting + redis.call('XLEN', stream) end
  return waiting
end

-- The XADD comes first: at maxmemory it is refused, and then nothing has changed.
local function enqueue(job, stream, cancel, progress, run)
  local fields = {'payload', run.payload, 'job_id', run.job_id, 'run', run.number}
  if run.traceparent ~= '' then
    table.insert(fields, 'traceparent')
    table.insert(fields, run.traceparent)
  end
  local entry_id = redis.call('XADD', stream, '*', unpack(fields))
  local uploads = redis.call('HGET', job, 'uploads')
  redis.call('DEL', job, cancel, progress)
  if uploads then redis.call('HSET', job, 'uploads', uploads) end
  redis.call('HSET', job, 'state', 'queued', 'run', run.number, 'attempt', 0, 'priority', run.priority,
    'entry_id', entry_id, 'payload', run.payload, 'fingerprint', run.fingerprint, 'submitted_at', now_ms())
  if run.caller and run.caller ~= '' then redis.call('HSET', job, 'caller', run.caller) end
end
"""

# What keeps a new run out, as {verdict, count, group, waiting, ends, since_ms}: full (so many jobs wait), tenant_full
# (so many of the tenant's are unfinished), unheard (so many events are kept, and that group holds them). The last two
# say how fast runs end: so many of the newest did in the last ten minutes, the first of them so many milliseconds ago.
_REFUSAL = f"""
local function ends_lately(ended)
  local now, count, since_ms = now_ms(), 0, 0
  for _, ended_at in ipairs(redis.call('LRANGE', ended, 0, -1)) do
    local age_ms = now - tonumber(ended_at)
    if age_ms > {DRAIN_WINDOW_MS} then break end
    count, since_ms = count + 1, age_ms
  end
  return count, since_ms
end

local function refusal(streams, delayed, completions, ended, tenants, tenant, limits)
  local waiting = depth(streams, delayed)
  if waiting >= limits.queue then return {{'full', waiting, '', waiting, ends_lately(ended)}} end
  if tenant ~= '' and limits.tenant > 0 then
    local unfinished = tonumber(redis.call('HGET', tenants, tenant)) or 0
    if unfinished >= limits.tenant then return {{'tenant_full', unfinished, '', waiting, ends_lately(ended)}} end
  end
  if limits.completions > 0 then
    local slowest = ''
    if redis.call('XLEN', completions) >= limits.completions then slowest = trim(completions) end
    local kept = redis.call('XLEN', completions)
    if kept >= limits.completions then return {{'unheard', kept, slowest, waiting, 0, 0}} end
  end
end
"""

# Accepts a run, once. Its number is 1 for a new job, last + 1 for a run that follows a failed or cancelled one.
# Answers {verdict, run, state}: accepted; same (this very run is there already); conflict (another body has this id);
# refused (the last run does not allow this one); or the refusal for want of room.
# `caller` is written with the run it belongs to: a second step could be lost, and the run would be nobody's. A tenant's
# run is counted in the same step, and gives its place back in the one that ends it.
SUBMIT = (
    PRELUDE
    + _ENQUEUE
    + TRIM
    + _REFUSAL
    + """
local job, stream, delayed, cancel, progress = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local streams, completions, ended, tenants = {KEYS[6], KEYS[7], KEYS[8]}, KEYS[9], KEYS[10], KEYS[11]
local run = {job_id = ARGV[1], number = tonumber(ARGV[2]), payload = ARGV[3], fingerprint = ARGV[4],
  priority = ARGV[5], traceparent = ARGV[6], caller = ARGV[7], tenant = ARGV[8]}
local limits = {queue = tonumber(ARGV[9]), tenant = tonumber(ARGV[10]), completions = tonumber(ARGV[11])}
local values = redis.call('HMGET', job, 'run', 'state', 'fingerprint')
local last = {number = tonumber(values[1]), state = values[2], fingerprint = values[3]}

if last.number ~= nil then
  local same_body = last.fingerprint == run.fingerprint
  local may_follow = last.state == 'failed' or last.state == 'cancelled'
  if run.number == 1 or run.number == last.number then
    return {same_body and 'same' or 'conflict', last.number, last.state}
  elseif run.number ~= last.number + 1 or not may_follow then
    return {'refused', last.number, last.state}
  end
end
local refused = refusal(streams, delayed, completions, ended, tenants, run.tenant, limits)
if refused then return refused end
enqueue(job, stream, cancel, progress, run)
if run.tenant ~= '' then
  redis.call('HSET', job, 'tenant', run.tenant)
  redis.call('HINCRBY', tenants, run.tenant, 1)
end
return {'accepted', run.number, 'queued'}
"""
)

# SUBMIT for the run that follows a dead one: its letter, the last key and argument, goes with it. Answers as SUBMIT, or
# gone: the letter has been replayed or dropped (perhaps by this very call, whose reply was lost).
REPLAY = f"""
local function submit()
{SUBMIT}
end

local dead, letter_id = KEYS[#KEYS], ARGV[#ARGV]
if #redis.call('XRANGE', dead, letter_id, letter_id) == 0 then return {{'gone', 0, ''}} end
local reply = submit()
if reply[1] == 'accepted' or reply[1] == 'same' then redis.call('XDEL', dead, letter_id) end
return reply
"""

# Asks the consumers to cancel, unless the last run has ended: its cancel key would be a later run's. Answers the state.
ASK_TO_CANCEL = (
    IS_TERMINAL
    + """
local state = redis.call('HGET', KEYS[1], 'state') or ''
if not is_terminal(state) then redis.call('SET', KEYS[2], 1, 'EX', ARGV[1]) end
return state
"""
)

# Ends a run that waits (one called delayed may be back in its stream). Answers: ended, or changed when the job is not
# where the caller saw it.
CANCEL_WAITING = (
    PRELUDE
    + """
local stream, job, cancel, progress = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local completions, ended, tenants, delayed = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local group, entry_id, seen_run, seen_state, seen_attempt = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local run = {job_id = ARGV[6], state = 'cancelled', type = ARGV[7], event = ARGV[8], payload = ARGV[9],
  ttl_ms = ARGV[10]}
local held = redis.call('HMGET', job, 'run', 'state', 'attempt', 'entry_id', 'event')
if held[2] == 'cancelled' and held[5] == run.event then return 'ended' end
if held[1] ~= seen_run or held[2] ~= seen_state or held[3] ~= seen_attempt or held[4] ~= entry_id then
  return 'changed'
end
redis.call('ZREM', delayed, run.job_id)
redis.call('XACK', stream, group, entry_id)
redis.call('XDEL', stream, entry_id)
end_run(job, cancel, progress, completions, ended, tenants, run)
return 'ended'
"""
)
