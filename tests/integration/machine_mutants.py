"""The mechanisms of the queue's scripts, one by one: with any of these lines taken out the machine goes red.

Most do within the 50 examples of `make test`. Some need what seldom happens, and up to 600 examples, which `make chaos`
gives them: the tokens of RETRY and EXTEND, RETRY's looks at the owner and the state, a start announced twice, a job
promoted twice, CANCEL_WAITING's looks at state and entry, the run number in SUBMIT, a BEGIN that renews nothing, a trim
of what one group still needs.
Not in the list is what another line guards as well: BEGIN's look whether the owned run has ended (its entry is gone
then), and CANCEL_WAITING's at run and attempt (each has an entry of its own).
"""

from types import ModuleType
from typing import NamedTuple

from consumer.queue import scripts as consumer_scripts
from producer import scripts as producer_scripts
from schemas import lua


class Mutant(NamedTuple):
    """`old` becomes `new` wherever it stands in the script."""

    name: str
    module: ModuleType
    script: str
    old: str
    new: str

    @property
    def text(self) -> str:
        """The broken script. Raises AssertionError where the line is no longer there."""
        text: str = getattr(self.module, self.script)
        assert self.old in text, "the script has changed: so must the mutant"
        return text.replace(self.old, self.new)


def _of(module: ModuleType, script: str, *mutations: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(f"{script}: {name}", module, script, old, new) for name, old, new in mutations]


NO_OWNER = ("no look at the owner", "if not is_owner(stream, group, entry_id, consumer) then return 'lost' end", "")
NO_TOKEN = ("no look at the token", "if held[1] ~= lease then return 'lost' end", "")
NO_XDEL = ("no XDEL", "redis.call('XDEL', stream, entry_id)", "")
NO_XACK = ("no XACK", "redis.call('XACK', stream, group, entry_id)", "")

MUTANTS = [
    *_of(
        consumer_scripts,
        "BEGIN",
        (NO_OWNER[0], "if not is_owner(stream, group, entry_id, consumer) then return {'lost'} end", ""),
        ("any run takes over", "run == last.run + 1 and (last.state == 'failed' or last.state == 'cancelled')", "true"),
        ("any state is followed", "(last.state == 'failed' or last.state == 'cancelled')", "true"),
        ("any run number follows", "run == last.run + 1 and", ""),
        ("any entry owns the run", "last.entry_id == entry_id\n  and last.priority == priority", "true"),
        ("duplicates stay", "  remove(stream, group, entry_id)\n  redis.call('HINCRBY'", "  redis.call('HINCRBY'"),
        ("a repeated call counts again", "if last.begun == lease then", "if false then"),
        ("cancellation is not seen", "if redis.call('EXISTS', cancel) == 1 then return verdict('cancelled') end", ""),
        ("the invalid is begun", "if not valid then return verdict('refused') end", ""),
        ("the expired is begun", "if last.attempt == 0 and expires_at ~= nil", "if false"),
        ("a later attempt expires", "last.attempt == 0 and expires_at ~= nil", "expires_at ~= nil"),
        ("attempts without bound", "if last.attempt >= max_attempts then", "if false then"),
        ("attempts are not counted", "redis.call('HINCRBY', job, 'attempt', 1)", ""),
        ("the lease is not written", "'lease', lease, 'consumer', consumer", "'consumer', consumer"),
        ("the lease is not renewed", "renew(stream, group, entry_id, consumer)\nredis", "redis"),
    ),
    *_of(
        consumer_scripts,
        "START",
        (NO_OWNER[0], " or not is_owner(stream, group, entry_id, consumer)", ""),
        (NO_TOKEN[0], "held[1] ~= lease or ", ""),
        ("a repeated call changes something", "if held[2] ~= 'running' then", "if true then"),
        ("a number is announced twice", "if held[4] ~= held[3] then", "if true then"),
    ),
    *_of(consumer_scripts, "PROGRESS", (NO_TOKEN[0], "redis.call('HGET', job, 'lease') ~= ARGV[1]", "false")),
    *_of(consumer_scripts, "NOTE_UPLOAD", (NO_TOKEN[0], "redis.call('HGET', job, 'lease') ~= lease", "false")),
    *_of(
        consumer_scripts,
        "EXTEND",
        NO_OWNER,
        (NO_TOKEN[0], "if lease ~= '' and redis.call('HGET', job, 'lease') ~= lease then return 'lost' end", ""),
        ("no renewal", "renew(stream, group, entry_id, consumer)\nif", "if"),
    ),
    *_of(
        consumer_scripts,
        "FINISH",
        NO_OWNER,
        NO_TOKEN,
        ("no look at the state", "if is_terminal(held[2]) then return 'ok' end", ""),
        NO_XDEL,
        NO_XACK,
        ("no letter", "if dead_lettered then", "if false then"),
        ("the cancel key stays", "redis.call('DEL', cancel)", ""),
        ("the payload stays", ", 'payload', run.payload,\n    'consumer'", ",\n    'consumer'"),
        ("no expiry", "redis.call('PEXPIRE', job, run.ttl_ms)", ""),
        ("no completion", "redis.call('XADD', completions,", "redis.call('XADD', completions .. ':no',"),
    ),
    *_of(
        consumer_scripts,
        "RETRY",
        NO_OWNER,
        NO_TOKEN,
        ("no look at the state", "if held[2] == 'delayed' then return 'ok' end", ""),
        NO_XDEL,
        ("not delayed", "redis.call('ZADD', delayed, now_ms() + tonumber(ARGV[7]), job_id)", ""),
        ("due at once", "now_ms() + tonumber(ARGV[7])", "now_ms() - 1"),
    ),
    *_of(
        consumer_scripts,
        "RELEASE",
        NO_OWNER,
        (NO_TOKEN[0], "if lease ~= '' and held[1] ~= lease then return 'lost' end", ""),
        ("the attempt counts", "redis.call('HINCRBY', job, 'attempt', -1)", ""),
        ("uncounts what was not counted", "if held[2] == lease then", "if true then"),
        ("the lease stays", "redis.call('HDEL', job, 'lease')", ""),
        (
            "acknowledges",
            "redis.call('XCLAIM', stream, group, nobody, 0, entry_id, 'IDLE', idle_ms, 'JUSTID')",
            "redis.call('XACK', stream, group, entry_id)",
        ),
    ),
    *_of(
        consumer_scripts,
        "PROMOTE",
        ("no ZREM", "redis.call('ZREM', delayed, job_id)", ""),
        ("before its time", "tonumber(due) > now_ms()", "false"),
        ("twice", "if not due or", "if due and"),
        ("the entry is not noted", "redis.call('HSET', job, 'entry_id', entry_id)", ""),
        ("the state stays", "redis.call('HSET', job, 'state', 'queued')", "redis.call('PING')"),
    ),
    *_of(
        consumer_scripts,
        "RECLAIM",
        ("from the living", "min_idle_ms, cursor, 'COUNT'", "0, cursor, 'COUNT'"),
        ("acknowledges what is there", "if entry then return", "if false then return"),
    ),
    *_of(consumer_scripts, "BURY", NO_OWNER, NO_XDEL),
    *_of(
        consumer_scripts,
        "LEAVE",
        ("drops what is pending", "redis.call('XPENDING', stream, group, '-', '+', 1, consumer)[1]", "false"),
    ),
    *_of(
        producer_scripts,
        "SUBMIT",
        ("any state is followed", "or not may_follow then", "then"),
        ("any run number follows", "elseif run.number ~= last.number + 1 or", "elseif"),
        ("a repeated call adds again", "if run.number == 1 or run.number == last.number then", "if false then"),
        ("the old hash stays", "redis.call('DEL', job, cancel, progress)", ""),
    ),
    *_of(
        producer_scripts,
        "REPLAY",
        ("the letter stays", "if reply[1] == 'accepted' or reply[1] == 'same' then", "if false then"),
        ("the letter need not be there", "#redis.call('XRANGE', dead, letter_id, letter_id) == 0", "false"),
    ),
    *_of(
        producer_scripts,
        "CANCEL_WAITING",
        ("no look at the state", "held[2] ~= seen_state or ", ""),
        ("no look at the entry", " or held[4] ~= entry_id then", " then"),
        ("no look at anything", "if held[1] ~= seen_run or", "if false and held[1] ~= seen_run or false and"),
        ("no look at its own event", "if held[2] == 'cancelled' and held[5] == run.event then return 'ended' end", ""),
        ("no ZREM", "redis.call('ZREM', delayed, run.job_id)", ""),
        NO_XACK,
        NO_XDEL,
    ),
    *_of(producer_scripts, "ASK_TO_CANCEL", ("an ended job, too", "if not is_terminal(state) then", "if true then")),
    *_of(
        lua,
        "TRIM_COMPLETIONS",
        ("what is pending", "if pending[1] > 0 then", "if false then"),
        ("what one group needs", "if slowest == nil or earlier(needs, slowest.needs) then", "if true then"),
    ),
]
