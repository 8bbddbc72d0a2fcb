"""The parts of the atomic scripts that both sides share: how a run ends is one thing, whoever ends it.

The text is prepended to the scripts of `consumer` and `producer`; it holds local functions only. Keys come in by name,
times are milliseconds of the server's clock.
"""

from schemas.keys import PROGRESS_MAX_ENTRIES, PROGRESS_TTL_SECONDS

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
END_RUN = f"""
local function end_run(job, cancel, progress, completions, run)
  redis.call('HSET', job, 'state', run.state, 'event', run.event, 'ended_at', now_ms(), 'payload', run.payload,
    'consumer', '')
  redis.call('PEXPIRE', job, run.ttl_ms)
  redis.call('DEL', cancel)
  redis.call('XADD', completions, '*', 'type', run.type, 'job_id', run.job_id, 'payload', run.event)
  redis.call('XADD', progress, 'MAXLEN', '~', {PROGRESS_MAX_ENTRIES}, '*',
    'type', run.type, 'job_id', run.job_id, 'payload', run.event)
  redis.call('EXPIRE', progress, {PROGRESS_TTL_SECONDS})
end
"""

PRELUDE = CLOCK + IS_TERMINAL + END_RUN
