"""The consumer's atomic steps, as Lua for Redis 6.2 and newer.

Every script may be sent twice (a client repeats a command whose reply was lost), so each recognises its own work:
`lease` is unique to one begin and stays in the job's hash. It is the fence, too: another lease is somebody else's.
"""

from schemas.keys import DEAD_MAX_ENTRIES
from schemas.lua import PRELUDE

_OWNERSHIP = """
local function is_owner(stream, group, entry_id, consumer)
  local pending = redis.call('XPENDING', stream, group, entry_id, entry_id, 1)
  return pending[1] ~= nil and pending[1][2] == consumer
end

local function renew(stream, group, entry_id, consumer)
  redis.call('XCLAIM', stream, group, consumer, 0, entry_id, 'IDLE', 0, 'JUSTID')
end

local function remove(stream, group, entry_id)
  redis.call('XACK', stream, group, entry_id)
  redis.call('XDEL', stream, entry_id)
end
"""

# Only the newest dead letters are kept. The end of each job among those that go was published as `failed`.
_DEAD = f"""
local function add_letter(dead, ...)
  redis.call('XADD', dead, 'MAXLEN', '~', {DEAD_MAX_ENTRIES}, '*', ...)
end
"""

_HEAD = PRELUDE + _OWNERSHIP + _DEAD

# Takes the job over for one attempt. Verdicts: lost, duplicate, cancelled, refused, expired, exhausted, ok.
# All but the first two leave the caller as the lease's owner, who has to end the run or do the work.
BEGIN = (
    _HEAD
    + """
local stream, job, cancel, progress, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local group, entry_id, consumer, lease = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local run, priority, payload, fingerprint = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8]
local max_attempts, expires_at, valid = tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11] == '1'
local traceparent = ARGV[12]
local now = now_ms()

if not is_owner(stream, group, entry_id, consumer) then return {'lost'} end

local function read_job()
  local values = redis.call('HMGET', job, 'run', 'state', 'attempt', 'entry_id', 'begun', 'submitted_at', 'priority')
  return {run = tonumber(values[1]), state = values[2], attempt = tonumber(values[3]) or 0, entry_id = values[4],
    begun = values[5], submitted_at = values[6], priority = values[7]}
end

local last = read_job()
local takes_over = last.run == nil or (run == last.run + 1 and (last.state == 'failed' or last.state == 'cancelled'))
-- an id is unique in its stream alone: two streams may well have the same
local owns = run == last.run and not is_terminal(last.state) and last.entry_id == entry_id
  and last.priority == priority
if not takes_over and not owns then
  remove(stream, group, entry_id)
  redis.call('HINCRBY', counters, 'duplicates', 1)
  return {'duplicate'}
end
if takes_over then
  local uploads = redis.call('HGET', job, 'uploads')
  redis.call('DEL', job, progress)
  redis.call('HSET', job, 'state', 'queued', 'run', run, 'attempt', 0, 'priority', priority, 'entry_id', entry_id,
    'payload', payload, 'fingerprint', fingerprint, 'submitted_at', string.match(entry_id, '^%d+'))
  if uploads then redis.call('HSET', job, 'uploads', uploads) end
  last = read_job()
end
-- `begun` is the lease of the attempt that was counted last: a lease that only ends the run has counted none
if last.begun == lease then return {'ok', last.attempt, last.submitted_at, now, 'queued'} end

renew(stream, group, entry_id, consumer)
redis.call('HSET', job, 'lease', lease, 'consumer', consumer, 'traceparent', traceparent)
local function verdict(name) return {name, last.attempt, last.submitted_at, now, last.state} end
if redis.call('EXISTS', cancel) == 1 then return verdict('cancelled') end
if not valid then return verdict('refused') end
if last.attempt == 0 and expires_at ~= nil and now >= expires_at then return verdict('expired') end
if last.state == 'preparing' or last.state == 'running' then redis.call('HINCRBY', job, 'crashes', 1) end
if last.attempt >= max_attempts then return verdict('exhausted') end
redis.call('HSET', job, 'state', 'preparing', 'begun', lease)
redis.call('HINCRBY', job, 'attempt', 1)
return {'ok', last.attempt + 1, last.submitted_at, now, last.state}
"""
)

# The job has the GPU. Answers: ok, cancel, lost.
START = (
    _HEAD
    + """
local stream, job, cancel, completions = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, entry_id, consumer, lease, job_id, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local held = redis.call('HMGET', job, 'lease', 'state', 'attempt', 'started')
if held[1] ~= lease or not is_owner(stream, group, entry_id, consumer) then return 'lost' end
if redis.call('EXISTS', cancel) == 1 then return 'cancel' end
if held[2] ~= 'running' then
  renew(stream, group, entry_id, consumer)  -- first, since Redis at maxmemory refuses a script that begins with HSET
  redis.call('HSET', job, 'state', 'running', 'started', held[3])
  -- An attempt that was handed back is not counted: its number, and so its event's id, come again.
  if held[4] ~= held[3] then
    redis.call('XADD', completions, '*', 'type', 'generation.started', 'job_id', job_id, 'payload', event)
  end
end
return 'ok'
"""
)

# One step's progress. Answers: ok, cancel, lost.
PROGRESS = """
local job, cancel, progress = KEYS[1], KEYS[2], KEYS[3]
if redis.call('HGET', job, 'lease') ~= ARGV[1] then return 'lost' end
redis.call('XADD', progress, 'MAXLEN', '~', ARGV[2], '*', 'step', ARGV[4], 'total', ARGV[5], 'eta_s', ARGV[6])
redis.call('EXPIRE', progress, ARGV[3])
if redis.call('EXISTS', cancel) == 1 then return 'cancel' end
return 'ok'
"""

# Renews the lease; a lease that is empty belongs to an entry that was read and not begun. Answers: ok, cancel, lost.
EXTEND = (
    _HEAD
    + """
local stream, job, cancel = KEYS[1], KEYS[2], KEYS[3]
local group, entry_id, consumer, lease = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not is_owner(stream, group, entry_id, consumer) then return 'lost' end
if lease ~= '' and redis.call('HGET', job, 'lease') ~= lease then return 'lost' end
renew(stream, group, entry_id, consumer)
if redis.call('EXISTS', cancel) == 1 then return 'cancel' end
return 'ok'
"""
)

# Ends the run: acknowledgement, state, completion and dead letter together or not at all. Answers: ok, lost.
FINISH = (
    _HEAD
    + """
local stream, job, cancel, progress = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local completions, ended, tenants, dead = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local group, entry_id, consumer, lease, dead_lettered = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local run = {job_id = ARGV[6], state = ARGV[7], type = ARGV[8], event = ARGV[9], payload = ARGV[10], ttl_ms = ARGV[11]}
local held = redis.call('HMGET', job, 'lease', 'state', 'run', 'attempt')
if held[1] ~= lease then return 'lost' end
if is_terminal(held[2]) then return 'ok' end
if not is_owner(stream, group, entry_id, consumer) then return 'lost' end
remove(stream, group, entry_id)
end_run(job, cancel, progress, completions, ended, tenants, run)
if dead_lettered then
  add_letter(dead, 'job_id', run.job_id, 'run', held[3], 'payload', run.payload, 'event', run.event,
    'attempts', held[4], 'source', stream, 'died_at', now_ms())
end
return 'ok'
"""
)

# Puts the job aside until it is due again. Answers: ok, lost.
RETRY = (
    _HEAD
    + """
local stream, job, delayed, completions = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, entry_id, consumer, lease, job_id, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local held = redis.call('HMGET', job, 'lease', 'state')
if held[1] ~= lease then return 'lost' end
if held[2] == 'delayed' then return 'ok' end
if not is_owner(stream, group, entry_id, consumer) then return 'lost' end
remove(stream, group, entry_id)
redis.call('HSET', job, 'state', 'delayed', 'consumer', '')
redis.call('ZADD', delayed, now_ms() + tonumber(ARGV[7]), job_id)
redis.call('XADD', completions, '*', 'type', 'generation.retrying', 'job_id', job_id, 'payload', event)
return 'ok'
"""
)

# Hands an entry back at shutdown: it keeps its place in the stream, pending under nobody and idle for so long that
# the next reclaim takes it. A begun attempt is uncounted. Answers: ok, lost.
RELEASE = (
    _HEAD
    + """
local stream, job = KEYS[1], KEYS[2]
local group, entry_id, consumer, lease, nobody, idle_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if not is_owner(stream, group, entry_id, consumer) then return 'lost' end
local held = redis.call('HMGET', job, 'lease', 'begun')
if lease ~= '' and held[1] ~= lease then return 'lost' end
redis.call('XCLAIM', stream, group, nobody, 0, entry_id, 'IDLE', idle_ms, 'JUSTID')
if lease ~= '' then
  if held[2] == lease then
    redis.call('HINCRBY', job, 'attempt', -1)
    redis.call('HSET', job, 'state', 'queued', 'consumer', '')
    redis.call('HINCRBY', job, 'handbacks', 1)
    redis.call('HDEL', job, 'begun')
  end
  redis.call('HDEL', job, 'lease')
end
return 'ok'
"""
)

# Claims one entry whose lease has run out. Returns the cursor to go on from, and the entry's id and fields if there is
# one. Entries that were deleted under their owner are acknowledged: Redis 6.2 would keep them pending for ever.
RECLAIM = """
local stream, group, consumer, min_idle_ms, cursor = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local reply = redis.call('XAUTOCLAIM', stream, group, consumer, min_idle_ms, cursor, 'COUNT', 1, 'JUSTID')
local entry_id = reply[2][1]
if not entry_id then return {reply[1]} end
local entry = redis.call('XRANGE', stream, entry_id, entry_id)[1]
if entry then return {reply[1], entry_id, entry[2]} end
redis.call('XACK', stream, group, entry_id)
return {reply[1]}
"""

# Moves one delayed job that is due back to its stream. A job whose cancellation was asked for keeps `delayed` as its
# state, so that its event can say where it was.
PROMOTE = (
    PRELUDE
    + """
local delayed, job, cancel, stream = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local job_id = ARGV[1]
local due = redis.call('ZSCORE', delayed, job_id)
if not due or tonumber(due) > now_ms() then return 0 end
redis.call('ZREM', delayed, job_id)
local held = redis.call('HMGET', job, 'state', 'payload', 'run', 'traceparent')
if held[1] ~= 'delayed' then return 0 end
local fields = {'payload', held[2], 'job_id', job_id, 'run', held[3]}
if held[4] and held[4] ~= '' then
  table.insert(fields, 'traceparent')
  table.insert(fields, held[4])
end
local entry_id = redis.call('XADD', stream, '*', unpack(fields))
redis.call('HSET', job, 'entry_id', entry_id)
if redis.call('EXISTS', cancel) == 0 then redis.call('HSET', job, 'state', 'queued') end
return 1
"""
)

# An entry from which no job id can be read. Answers: ok, lost.
BURY = (
    _HEAD
    + """
local stream, dead = KEYS[1], KEYS[2]
local group, entry_id, consumer, raw = ARGV[1], ARGV[2], ARGV[3], ARGV[5]
if not is_owner(stream, group, entry_id, consumer) then return 'lost' end
remove(stream, group, entry_id)
add_letter(dead, 'raw', raw, 'source', stream, 'died_at', now_ms())
return 'ok'
"""
)

# Notes what is about to be uploaded through a URL that cannot be read back, a line for each attempt. Returns the notes
# that stood before, or 'lost'.
NOTE_UPLOAD = """
local job = KEYS[1]
local lease, note = ARGV[1], ARGV[2]
if redis.call('HGET', job, 'lease') ~= lease then return 'lost' end
local before = redis.call('HGET', job, 'uploads') or ''
local line = lease .. '\\t' .. note .. '\\n'
if not string.find(before, line, 1, true) then redis.call('HSET', job, 'uploads', before .. line) end
return before
"""

# Removes a consumer's name from a group where nothing is pending under it: what is would be dropped with it.
LEAVE = """
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
if redis.call('EXISTS', stream) == 0 then return 0 end
if redis.call('XPENDING', stream, group, '-', '+', 1, consumer)[1] then return 0 end
redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
return 1
"""
