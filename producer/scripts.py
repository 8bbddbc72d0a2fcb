"""The backend's atomic steps, as Lua for Redis 6.2 and newer. Each may be sent twice and recognises its own work."""

from schemas.lua import IS_TERMINAL, PRELUDE

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

# Accepts a run, once. Its number is 1 for a new job, last + 1 for a run that follows a failed or cancelled one.
# Answers {verdict, run, state}: accepted; same (this very run is there already); conflict (another body has this id);
# refused (the last run does not allow this one); full (with the number of jobs that wait in place of a run).
# `caller` is written with the run it belongs to: a second step could be lost, and the run would be nobody's.
SUBMIT = (
    PRELUDE
    + _ENQUEUE
    + """
local job, stream, delayed, cancel, progress = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local streams = {KEYS[6], KEYS[7], KEYS[8]}
local run = {job_id = ARGV[1], number = tonumber(ARGV[2]), payload = ARGV[3], fingerprint = ARGV[4],
  priority = ARGV[5], traceparent = ARGV[7], caller = ARGV[8]}
local max_queue = tonumber(ARGV[6])
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
local waiting = depth(streams, delayed)
if waiting >= max_queue then return {'full', waiting, ''} end
enqueue(job, stream, cancel, progress, run)
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
local stream, job, cancel, progress, completions, delayed = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
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
end_run(job, cancel, progress, completions, run)
return 'ended'
"""
)

# Trims the completions that every group has acknowledged; with no group, none. Returns how many went.
TRIM_COMPLETIONS = """
local function earlier(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end

if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local needed = nil
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  local oldest = info['last-delivered-id']
  local pending = redis.call('XPENDING', KEYS[1], info['name'])
  if pending[1] > 0 then oldest = pending[2] end
  if needed == nil or earlier(oldest, needed) then needed = oldest end
end
if needed == nil then return 0 end
return redis.call('XTRIM', KEYS[1], 'MINID', needed)
"""
