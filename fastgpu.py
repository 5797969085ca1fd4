#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["nvidia-ml-py"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Run a folder of scripts on all the GPUs of a box, one GPU per script.

    mkdir to_run; cp train-*.sh to_run/; chmod +x to_run/*
    fastgpu_poll

takes the scripts of ./to_run in sorted order and runs each on a GPU that nobody uses, as many at once as there
are such GPUs. A script that ended with status 0 lies in ./complete, any other in ./fail, and what it printed in
./out. The same from Python:

    import fastgpu
    fastgpu.ResourcePoolGPU('.').poll_scripts()

How it works, and why nothing is lost:

- A script is in exactly one of to_run, running, complete and fail, and nothing but a rename ever moves it.
- A run reserves its name by creating out/NAME.json with O_EXCL. So two pollers never take the same script, and a
  name in running, complete, fail and out means one run, for ever: the second run of train.sh is train-1.sh.
- That record, and a lock file per GPU, are locked with fcntl(2), by locks that belong to the open file. The script
  inherits them, so they last as long as it does, whatever becomes of the poller, and the kernel drops them when it
  ends, whatever ended it.
- When it has ended, the next script starts before it is filed: no GPU waits for that.
- The script runs under one line of /bin/sh, in a session of its own, which writes the exit status to
  out/NAME.exitcode even if the poller is dead by then.
- A name in running whose record nobody locks has therefore ended: with an exit status it is filed in complete or
  fail, without one it was cut off and goes back to to_run. Any poller of the host does that, again and again if
  need be: there is no other state, in memory or on disk, that could be wrong.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, Union

__version__ = '0.1.0'
__all__ = ['FastgpuError', 'FixedWorkerPool', 'ResourcePoolBase', 'ResourcePoolGPU', 'find_next_script', 'main',
           'safe_rename', 'setup_dirs']

StrPath = Union[str, 'os.PathLike[str]']

JUST_WRITTEN = 0.1  # seconds in which a file that was written to may still be being copied
LOOK_AROUND = 1.0   # seconds between two looks at the runs of others
OVERDUE = 3.0       # seconds after which whoever should have filed a script that ended is taken to be dead
GRACE = 10.0        # seconds that a script has between TERM and KILL


class FastgpuError(Exception):
    """Wrong use, or a queue or GPUs that cannot be used; the text says what to do about it."""


# --- Messages: lines on stderr, safe to print whatever a file is called ---------------------------------------------

def write(stream: TextIO, text: str) -> None:
    """Write `text` to standard output or standard error, or nothing from then on if nobody reads that any more."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # What is left in its buffer would fail again when Python ends, and make its exit status 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Log:
    """Lines on stderr, and on a terminal one more below them, which tells how far things are."""

    def __init__(self) -> None:
        self._bottom = ''

    def __call__(self, text: str, alarm: bool = False) -> None:
        """Write `text` and the time, to a file with the date; to a terminal with colours in red if it is an `alarm`."""
        text = f'{time.strftime("%H:%M:%S" if self._terminal() else "%Y-%m-%dT%H:%M:%S")} {text}'
        if alarm and self._terminal() and not os.environ.get('NO_COLOR'):
            text = f'\033[31m{text}\033[0m'
        self._write(text + '\n')

    def bottom(self, text: str) -> None:
        """Make `text` the line below the others, where there is a terminal to keep it there."""
        if self._bottom != text:
            self._bottom = text
            if self._terminal():
                self._write('')

    def _terminal(self) -> bool:
        """Return whether stderr is a terminal that can erase a line."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty() and os.environ.get('TERM', 'dumb') != 'dumb'
        return False

    def _write(self, lines: str) -> None:
        """Write `lines` above the line at the bottom. A terminal that is gone is no reason to stop working."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._terminal():
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                lines = f'\r\033[K{lines}{self._bottom[:max(0, width - 1)]}'
            write(sys.stderr, lines)


log = Log()


def shown(text: object) -> str:
    """Return `text` with everything escaped that could garble a terminal: control characters, invalid UTF-8."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def explain(error: Exception) -> str:
    """Return what an error says, for people: an OSError as `file: reason`."""
    if not isinstance(error, OSError) or not error.strerror:
        return shown(error)
    reason = 'is not a folder' if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
    names = ' -> '.join(os.fsdecode(name) for name in (error.filename, error.filename2) if name)
    return shown(f'{names}: {reason}' if names else reason)


def near(path: StrPath) -> str:
    """Return `path` as seen from the current folder, if it lies below that."""
    with contextlib.suppress(OSError, ValueError):
        return str(Path(path).relative_to(os.getcwd()))
    return str(path)


def remark(reason: str, path: StrPath) -> str:
    """Return what a script said last, the `reason` that it failed, and the file that tells more."""
    return shown(f'{reason or "said nothing"} ({near(path)})')


def duration(seconds: float) -> str:
    """Return `seconds` as people read it: `8.1 s`, or `1:02:03` from a minute on."""
    if seconds < 60:
        return f'{max(0.0, seconds):.1f} s'
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def count(number: int, thing: str) -> str:
    """Return `1 thing` or `2 things`."""
    return f'{number} {thing}' + 's' * (number != 1)


def time_left(mean: float, waiting: int, running: int) -> float:
    """Return the seconds until so many scripts have ended, if each takes the `mean` of those that did or still run."""
    return mean * (waiting + running / 2) / max(1, running)


def user_name(uid: int) -> str:
    """Return the name of a user, or the number where there is none."""
    import pwd  # here, because only `status` needs it
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


# --- Folders: the queue is five of them, and a script is a file in one ----------------------------------------------

def queue_folders(path: StrPath) -> list[Path]:
    """Return the folders to_run, running, complete, fail and out of the queue in `path`."""
    return [Path(path) / name for name in ('to_run', 'running', 'complete', 'fail', 'out')]


def setup_dirs(path: StrPath) -> list[Path]:
    """Create the folder `path` and its to_run, running, complete, fail and out, where they are missing.

    Returns those five, in that order. Raises OSError where one cannot be made. Their mode is 0755 less the umask:
    whoever else can write to them can run code as you.
    """
    folders = queue_folders(path)
    for folder in (Path(path), *folders):
        folder.mkdir(mode=0o755, exist_ok=True)
    return folders


def check_dirs(path: Path, folders: list[Path]) -> None:
    """Raise FastgpuError, with the remedy, where a queue in `path` with these `folders` could not work or be safe."""
    for folder in (path, *folders):
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise FastgpuError(f'{shown(folder)}: no permission to write there')
    for folder in folders[:4]:
        if folder.stat().st_dev != folders[0].stat().st_dev:
            raise FastgpuError(f'{shown(folder)} is on another file system than {shown(folders[0])}: '
                               'scripts could not be moved between them')
    if os.path.samefile(folders[0], folders[1]):
        raise FastgpuError(f'{shown(folders[1])} is the same folder as {shown(folders[0])}: '
                           'make it one of its own')
    if os.statvfs(folders[1]).f_flag & os.ST_NOEXEC:
        raise FastgpuError(f'{shown(folders[1])} is on a file system mounted noexec: no script can run from there')
    # Others cannot rename what is ours in a folder like /tmp: restricted deletion flag, chmod(1).
    sticky = path.stat().st_mode & stat.S_ISVTX
    open_to_others = [folder for folder in (*([] if sticky else [path]), *folders[:2])
                      if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    if open_to_others:
        names = ' '.join(shlex.quote(str(folder)) for folder in open_to_others)
        raise FastgpuError('others could have their code run as you; mend it with: ' + shown(f'chmod go-w {names}'))


# What keeps a file in to_run from being started, where it is more than something to be told.
IGNORED = 'ignored'  # no script at all: a folder, a FIFO, a name that is gone
NOT_EXECUTABLE = 'not executable'
FRESH = 'just written'
ENDING = 'its last run ends just now'


def condition(path: StrPath) -> str:
    """Return what keeps the file `path` from being run: nothing (''), or the reason in a few words."""
    try:
        status = os.stat(path)
    except OSError:
        return 'a link that leads nowhere' if os.path.islink(path) else IGNORED
    if not stat.S_ISREG(status.st_mode):
        return IGNORED
    if not os.access(path, os.X_OK):
        return NOT_EXECUTABLE
    # A time stamp in the future (a clock that was set back, a file server's clock) is not "just now".
    if 0 <= time.time() - status.st_mtime < JUST_WRITTEN:
        return FRESH
    return ''


def names_in(folder: StrPath) -> list[str]:
    """Return the names in `folder` that are not hidden, in sorted order."""
    return sorted(name for name in os.listdir(folder) if name[0] != '.')


def scripts_in(folder: StrPath) -> dict[str, str]:
    """Return the names of the scripts in `folder`, in sorted order, each with its `condition`."""
    found = {name: condition(os.path.join(folder, name)) for name in names_in(folder)}
    return {name: reason for name, reason in found.items() if reason != IGNORED}


def file_mark(path: StrPath) -> tuple[int, ...]:
    """Return what tells a file from another one and from itself before a change; () where there is none."""
    try:
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    except OSError:
        return ()


def find_next_script(p: StrPath) -> Path | None:
    """Return the first script in the folder `p` that can run, in sorted order of the names, or None.

    A script is a regular file, or a link to one, that is not hidden, is executable, and was not written to within
    the last 0.1 s: someone may still be copying it. Raises OSError where `p` cannot be read.
    """
    return next((Path(p) / name for name in names_in(p) if not condition(os.path.join(p, name))), None)


def numbered(name: str, n: int) -> str:
    """Return the name of the n-th further run of the script `name`: `train.sh`, `train-1.sh`, `train-2.sh`."""
    stem, suffix = os.path.splitext(name)
    return f'{stem}-{n}{suffix}' if n else name


def rename_new(source: StrPath, target: StrPath) -> None:
    """Rename like os.rename, but raise FileExistsError where that would overwrite `target`.

    One step with renameat2(2) and RENAME_NOREPLACE; where the C library, the kernel or the file system (NFS) has
    no such call, a look and an os.rename.
    """
    try:
        import ctypes  # here, because it costs a start that needs none of it 5 ms
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError):
        code = errno.ENOSYS
    else:
        cwd, noreplace = -100, 1
        if not renameat2(cwd, os.fsencode(source), cwd, os.fsencode(target), noreplace):
            return
        code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def safe_rename(file: StrPath, dest: StrPath, name: str | None = None) -> Path:
    """Move `file` into the folder `dest`, as `name` (default: its own); where that is taken, with a number in it.

    Returns the new path. Nothing is ever overwritten. Raises OSError, FileNotFoundError if `file` is gone.
    """
    n = 0
    while True:
        target = os.path.join(dest, numbered(name or os.path.basename(file), n))
        try:
            rename_new(file, target)
            return Path(target)
        except FileExistsError:
            n += 1


# --- Locks: bytes of a file, which a child inherits, and which the kernel gives back with the last who holds them ---

# These are the locks of fcntl(2) that belong to an open file, as those of flock(2) do: so they outlive whoever took
# them, as long as a child has that file open. But a file has many of them: each byte is a place that one script can
# have, all of them together are the whole resource, and one far behind is held by who asks whether a place is free.
ALL = 0, 1 << 20
ASKING = 1 << 20, 1
FLOCK = 'hhqqi'  # struct flock
NOTE = 256  # bytes in the file for each place, which say who has it


def lock_bytes(fd: int, place: tuple[int, int] = ALL, kind: int = fcntl.F_WRLCK) -> bool:
    """Lock a place in the open file `fd`, with F_UNLCK unlock it; return whether nobody else has it. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, *place, 0))
    except BlockingIOError:
        return False
    return True


def locked_byte(fd: int, place: tuple[int, int] = ALL) -> int | None:
    """Return the first byte of a lock that others have on a place in the open file `fd`, None where there is none."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *place, 0))
    kind, _, first, _, _ = struct.unpack(FLOCK, answer)
    return None if kind == fcntl.F_UNLCK else int(first)


def lock_file(fd: int, path: StrPath, place: tuple[int, int] = ALL) -> bool:
    """Lock a place in the open file `fd` if nobody has it and `path` still leads to that file. Raises OSError.

    A file that was deleted meanwhile can be locked by us and its successor by somebody else: that is no lock.
    """
    with contextlib.suppress(FileNotFoundError):
        return lock_bytes(fd, place) and os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    return False


def open_quietly(path: StrPath, flags: int = os.O_RDONLY) -> int:
    """Open what may be anything, a link or a FIFO, without following it or waiting for it. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def open_lock(path: StrPath) -> int:
    """Open the lock file `path`, made where it is missing, in a folder in which others may plant files.

    Raises OSError, with a reason for people, for anything that is not a lock file: a link, a FIFO.
    """
    mask = os.umask(0)  # all users of the host share it
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        # Without O_CREAT, with which the kernel refuses the files of others in a sticky folder (fs.protected_regular in
        # proc(5)).
        fd = open_quietly(path, os.O_RDWR)
    finally:
        os.umask(mask)
    status = os.fstat(fd)
    # A second name could be a file of ours, which we would write to (fs.protected_hardlinks).
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EINVAL, 'is not a lock file, or has a second name', str(path))
    return fd


def write_note(fd: int, place: tuple[int, int], text: str = '') -> None:
    """Say in a lock file who has a place, for people. All notes are as long: to truncate a file can take 0.3 ms."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, shown(text).encode('utf-8', 'replace')[:NOTE - 1].ljust(NOTE - 1) + b'\n', NOTE * place[0])


def why_locked(path: StrPath, place: tuple[int, int] = ALL) -> str:
    """Return why a place, or a part of it, in the lock file `path` is not free: '', or `busy: who`, or `unusable: why`.

    Who has it is what they wrote there, for people only: anybody can write to the file.
    """
    try:
        fd = open_quietly(path)
        try:
            first = locked_byte(fd, place)
            note = b'' if first is None else os.pread(fd, NOTE, NOTE * first)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return ''
    except OSError as error:
        return f'unusable: {explain(error)}'
    who = note.decode('utf-8', 'replace').strip('\0\n ') or f'locked, {path}'
    return '' if first is None else f'busy: {shown(who)}'


# --- Runs: a script, from its claim to where it is filed ------------------------------------------------------------

# The shell that runs a script. It outlives the poller, and signals to its group until the script is done; it writes
# the status of the words after its first to the file that is its first. A trap that is set, unlike a signal that is
# ignored, is not inherited by what it runs. Where the shell cannot even fork it exits with NOT_STARTED. `set +e` is
# for an environment with SHELLOPTS=errexit, the long names are for one that has short ones.
NOT_STARTED, NO_PROCESS = 254, 'fastgpu: no process to be had'
SHIM = ('set +e; fastgpu_file=$1 fastgpu_status=; shift; trap : HUP INT QUIT PIPE ALRM TERM USR1 USR2; '
        f'trap \'[ "$fastgpu_status" ] || {{ echo "{NO_PROCESS}" >&2; exit {NOT_STARTED}; }}\' EXIT; '
        '"$@"; fastgpu_status=$?; printf %s $fastgpu_status >"$fastgpu_file"; exit $fastgpu_status')


def write_all(fd: int, text: str) -> None:
    """Make `text` the whole of the open file `fd`, in one write, so that a reader sees the old or the new."""
    data = text.encode('utf-8', 'replace')
    if os.pwrite(fd, data, 0) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if os.fstat(fd).st_size > len(data):  # to cut off nothing costs as much as all the rest
        os.ftruncate(fd, len(data))


def read_record(fd: int) -> dict[str, Any]:
    """Return the record in the open file `fd`; {} where it is none of ours, or a power cut left it empty."""
    try:
        record = json.loads(os.pread(fd, 1 << 16, 0))
        script, started = record['script'], float(record['started'])
        os.fsencode(script)
        if (script == os.path.basename(script) and script[0] != '.' and abs(started) < 1e12
                and isinstance(record['host'], str) and isinstance(record['ids'], list)):
            return {**record, 'started': started}
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        pass
    return {}


def runs_shim(pid: object, exitcode: StrPath) -> bool:
    """Return whether the process `pid` is the shim that will write `exitcode` (proc(5), cmdline)."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/cmdline', 'rb') as file:
        return os.fsencode(exitcode) in file.read().split(b'\0')
    return False


def session_groups(leader: int) -> set[int]:
    """Return the process groups that are alive in the session of `leader`: timeout(1) and `set -m` make their own.

    A zombie is not alive (proc(5), stat).
    """
    groups = set()
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        with contextlib.suppress(OSError, ValueError):
            with open(f'/proc/{pid}/stat', 'rb') as file:
                state, _, group, session = file.read().rpartition(b')')[2].split()[:4]
            if int(session) == leader and state != b'Z':
                groups.add(int(group))
    return groups


def describe(code: int | None) -> str:
    """Return what the exit status `code` of a shell says, in a few words."""
    if code is None:
        return 'cut off'
    with contextlib.suppress(ValueError):
        return f'status {code}, {signal.Signals(code - 128).name}'
    return f'status {code}'


def last_line(path: StrPath) -> str:
    """Return the last line in `path` that is not blank, or '', in at most 200 characters."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        file.seek(-min(4096, os.fstat(file.fileno()).st_size), os.SEEK_END)
        lines = file.read().decode('utf-8', 'replace').split('\n')
        return shown(next((line.strip() for line in reversed(lines) if line.strip()), ''))[:200]
    return ''


def missing_interpreter(script: Path) -> str:
    """Return a sentence if the first line of `script` names an interpreter that does not exist, else ''.

    The shell says only that the script was not found, which it plainly was. Often it is a carriage return.
    """
    with contextlib.suppress(OSError), open(script, 'rb') as file:
        words = file.readline(300).rstrip(b'\n')
        interpreter = words[2:].strip(b' \t').split(b' ')[0]
        if words.startswith(b'#!') and not os.path.exists(interpreter):
            return f'its interpreter {os.fsdecode(interpreter)} does not exist'
    return ''


class Queue:
    """The folders of a queue, as this host sees them."""

    def __init__(self, path: StrPath, only_look: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self.host = os.uname().nodename
        self.folders = queue_folders(self.path)
        self.to_run, self.running, self.complete, self.fail, self.out = self.folders
        if not only_look:
            setup_dirs(self.path)
            check_dirs(self.path, self.folders)
        elif not os.path.isdir(self.to_run):
            raise FastgpuError(f'{shown(self.path)} is no queue: it has no folder to_run (fastgpu_poll makes one)')
        self.alive = self.path / f'.{self.host}.poller'  # a lock that every poller of this host shares

    def claim(self, script: str, kind: str, ids: Sequence[Any]) -> Run | None:
        """Reserve a name for a run of `script` and move it to running/ under that name; None if it is gone.

        Raises FastgpuError where that can never be done, OSError where it cannot now.
        """
        record = {'script': script, 'host': self.host, 'kind': kind, 'ids': ids, 'started': round(time.time(), 3)}
        for n in itertools.count():
            run = Run(self, numbered(script, n))
            too_long = len(os.fsencode(run.name + '.exitcode')) - 255  # NAME_MAX of all file systems of Linux
            if too_long > 0:
                raise FastgpuError(f'its name is too long, by {too_long} bytes')
            try:
                if run.reserve(record):
                    # From here on, a name in running/ whose record is not locked has no owner.
                    os.rename(f'{self.to_run}/{script}', run.path)
                    return run
            except BaseException as error:
                gone = isinstance(error, FileNotFoundError)
                # On NFS the reply to a rename can be lost, and its repetition finds nothing to rename.
                if gone and os.path.lexists(run.path):
                    return run
                run.unclaim()
                if gone and not os.path.lexists(f'{self.to_run}/{script}'):
                    return None
                if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EBUSY, errno.EXDEV,
                                                                  errno.ENAMETOOLONG):
                    raise FastgpuError(f'it cannot be moved: {error.strerror}') from None
                raise
        raise AssertionError('unreachable')


RUNS, ENDED, ELSEWHERE, LOST = 'runs', 'ended', 'elsewhere', 'lost'


class Run:
    """A script in running/: one that this poller started, or one that it found there."""

    def __init__(self, queue: Queue, name: str) -> None:
        self.queue, self.name = queue, name
        self.path = f'{queue.running}/{name}'
        self.record: dict[str, Any] = {}
        self.fd = -1  # the file of the record
        self.held: Sequence[Any] = ()  # the resources that we hold for it
        self.process: subprocess.Popen[bytes] | None = None  # its shim, if we are the one who waits for it
        self.is_new = False  # whether we started it, and did not log that yet
        self.pidfd = -1  # readable when that has ended
        self.status: int | None = None  # how it ended as we know it, whether or not that could be written
        self.kill_at: float | None = None  # when it gets KILL, set when it got TERM
        self.finished = 0.0  # when it ended, once it is settled

    # Its files.

    @property
    def script(self) -> str:
        """The name it had in to_run, and will have if it goes back there."""
        return str(self.record.get('script', self.name))

    @property
    def ids(self) -> Sequence[Any]:
        """The resources that it has or had, by its record."""
        ids: Sequence[Any] = self.record.get('ids', '?')
        return ids

    def out(self, kind: str) -> str:
        """Return its file of that `kind` in out/."""
        return f'{self.queue.out}/{self.name}.{kind}'

    def is_taken(self) -> bool:
        """Return whether there is anything but a record of a run of this name."""
        folders = [f'{folder}/{self.name}' for folder in (self.queue.running, self.queue.complete, self.queue.fail)]
        return any(map(os.path.lexists, folders + [self.out(kind) for kind in ('stdout', 'stderr', 'exitcode')]))

    def reserve(self, record: dict[str, Any]) -> bool:
        """Make `record` its record, and lock it; return False where its name is that of another run. Raises OSError.

        A record that nobody locks, of a run that never began, was left by a poller that died here: it is taken over.
        """
        if self.is_taken():
            return False
        try:
            self.fd = os.open(self.out('json'), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            ours = lock_file(self.fd, self.out('json'))
        except FileExistsError:
            ours = False
            with contextlib.suppress(OSError):  # a folder or a FIFO, or just removed
                self.open_record()
                ours = (lock_file(self.fd, self.out('json')) and self.host() == self.queue.host
                        and not self.record.keys() & {'pid', 'finished'} and not self.is_taken())
        if ours:
            self.record = record
            self.save()
        else:
            self.close_record()
        return ours

    def open_record(self) -> None:
        """Open and read the record of a run that is not ours, as it is now. Raises OSError."""
        self.close_record()
        path = self.out('json')
        self.fd = open_quietly(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        self.record = read_record(self.fd)

    def close_record(self) -> None:
        """Close it, and with that give the lock on it back, if that is ours alone."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def save(self) -> None:
        """Write what we know of the run to its record. Raises OSError."""
        write_all(self.fd, json.dumps(self.record, default=str) + '\n')

    def host(self) -> str:
        """Return its host by its record: ours if that stays empty, '' while it may be on its way here. Raises OSError.

        A record stays empty where its poller, or the power, died between two system calls. After a minute (file
        servers and caches take at most half of one) it is taken for such a one, and for ours.
        """
        status = os.fstat(self.fd)
        stays_empty = status.st_size == 0 and time.time() - status.st_mtime > 60
        return str(self.record.get('host') or (self.queue.host if stays_empty else ''))

    def exit_code(self) -> tuple[int | None, float]:
        """Return its exit status and the time it ended, or None and now. Raises OSError.

        An empty file is none: the shim makes the file and then writes to it.
        """
        try:
            with open(self.out('exitcode'), 'rb') as file:
                finished = os.fstat(file.fileno()).st_mtime
                text = file.read(8)
        except FileNotFoundError:
            return None, time.time()
        return int(text) if re.fullmatch(rb'[0-9]{1,3}', text) else None, finished

    def was_started(self) -> bool:
        """Return whether it was, by what it wrote where its record has no pid: its poller died before it wrote that."""
        sizes = [os.stat(self.out(kind)).st_size for kind in ('stdout', 'stderr') if os.path.exists(self.out(kind))]
        return 'pid' in self.record or any(sizes) or os.path.lexists(self.out('exitcode'))

    # Its processes.

    def launch(self, command: Sequence[str], locks: Iterable[int], environment: dict[str, str]) -> None:
        """Start `command` under a shim that inherits our files `locks`. Raises OSError where that fails."""
        with open(self.out('stdout'), 'ab', 0) as stdout, open(self.out('stderr'), 'ab', 0) as stderr:
            self.process = subprocess.Popen(
                ['/bin/sh', '-c', SHIM, 'fastgpu', self.out('exitcode'), *command], stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=stderr, start_new_session=True, pass_fds=(self.fd, *locks), env=environment)
        self.record['pid'] = self.process.pid
        with contextlib.suppress(OSError):  # a full disk: while we live, we know it
            self.save()
        with contextlib.suppress(AttributeError, OSError):  # before Linux 5.3, or built for that: the interval does
            self.pidfd = os.pidfd_open(self.process.pid)

    def unclaim(self) -> None:
        """Undo the claim of a run that was never started, so that nothing of it is left. Raises OSError."""
        if self.fd < 0:
            return
        try:
            for kind in ('stdout', 'stderr'):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.out(kind))
            with contextlib.suppress(FileNotFoundError):
                safe_rename(self.path, self.queue.to_run, self.script)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.out('json'))
        finally:
            self.close_record()

    @property
    def is_alive(self) -> bool:
        """Whether it is ours and its shim runs, or did when we looked last."""
        return self.process is not None and self.process.returncode is None

    def shim(self) -> int | None:
        """Return the pid of its shim, which is the id of its session, or None if it is not alive."""
        pid = self.record.get('pid')
        alive = self.is_alive if self.process else runs_shim(pid, self.out('exitcode'))
        return pid if alive and isinstance(pid, int) else None

    def signal(self, signum: int) -> bool:
        """Send a signal to its session, if its shim can be waited for, so that the session is still its own.

        Returns whether anything was alive there.
        """
        pid = self.shim()
        groups = session_groups(pid) if pid else set()
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # a group that is all sudo(8)'s
                os.killpg(group, signum)
        return bool(groups)

    def terminate(self, why: str) -> None:
        """Send it TERM, and KILL after the grace period (see `kill`); its record says `why`."""
        self.kill_at = time.monotonic() + GRACE
        self.record[why] = True
        with contextlib.suppress(OSError):
            self.save()  # first: whoever settles it then knows
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill what is left of a run that got TERM, if its script has ended or its grace period has."""
        if self.kill_at is None:
            return
        ended = None
        if self.process and self.is_alive:
            with contextlib.suppress(ChildProcessError):  # WNOWAIT: without reaping it, so that its pid stays its own
                ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended or time.monotonic() >= self.kill_at:
            deadline = time.monotonic() + 0.5  # what it held is not for the next script before all of it is gone
            while self.signal(signal.SIGKILL) and time.monotonic() < deadline:
                time.sleep(0.001)

    # Its end.

    def state(self) -> str:
        """Return whether it RUNS or has ENDED here, runs ELSEWHERE, or is LOST, without a record. Raises OSError.

        A run that is not ours has ended when nobody locks its record any more. Where a daemon that it left behind still
        does, or where somebody replaced the record by a copy, its exit status and its shim tell.
        """
        if self.process:
            return RUNS if self.is_alive else ENDED
        try:
            self.open_record()
        except OSError:  # none, or a folder or a FIFO
            return LOST
        host = self.host()
        if host and host != self.queue.host:
            return ELSEWHERE
        code, finished = self.exit_code()
        if locked_byte(self.fd) is not None:
            return ENDED if time.time() - finished > OVERDUE else RUNS
        return RUNS if not host or (code is None and self.shim()) else ENDED

    def advice(self, state: str) -> str:
        """Return what there is to say of a run in a `state`, if it is not ours, to who waits for it. Raises OSError."""
        name, requeue = shown(self.name), shown(f'mv {shlex.quote(self.path)} {shlex.quote(str(self.queue.to_run))}/')
        if state == RUNS:
            return f'waiting for {name}, which runs without this poller'
        if state == LOST:
            return f'{shown(self.path)} has no record in out; if nothing runs it: {requeue}'
        code, host = self.exit_code()[0], shown(self.host())
        if code is None:
            return f'{name} runs on {host}; if that host is gone: {requeue}'
        return f'{name} ended on {host} ({describe(code)}): start fastgpu_poll there'

    def taken_out(self) -> bool:
        """Return whether it is certainly no longer in running/: not if the folder is gone too, or cannot be read."""
        try:
            os.lstat(self.path)
        except OSError as error:
            return isinstance(error, FileNotFoundError) and os.path.isdir(self.queue.running)
        return False

    def seconds(self, since: float = 0) -> float:
        """Return how long it ran, counted from the time `since` at the earliest. To be asked when it is settled."""
        started: float = self.record.get('started', self.finished)
        return max(0.0, self.finished - max(since, started))

    def settle(self, code: int | None, finished: float) -> tuple[str, str]:
        """File it, if it has ended and its record is ours, in complete, fail or to_run, by its `exit_code`.

        Each step can be repeated: a crash between two leaves what the next settle completes. Returns the folder it
        is in now, or 'cancelled', and what there is to say of it. Raises OSError, say for a full disk.
        """
        name, record, queue = shown(self.name), self.record, self.queue
        if self.status is None and not self.was_started():  # its poller died before that
            self.unclaim()
            return 'to_run', f'requeue {name} (was not started)'
        self.finished = finished
        if code is None and self.status is not None:
            Path(self.out('exitcode')).write_text(str(self.status))
            code = self.status
        if 'finished' not in record:
            record.update(finished=round(finished, 3), exitcode=code)
            self.save()
        # An empty file is all that a full disk, and no poller, let the shim write: it ended, nobody knows how.
        unknown = code is None and os.path.lexists(self.out('exitcode'))
        killed = code is None and (record.get('stopped') or record.get('cancelled'))
        how = 'status unknown, the disk was full' if unknown else 'killed' if killed else describe(code)
        how = f'({how}, {duration(self.seconds())})'
        if not os.path.lexists(self.path):  # cancelled by a person, or filed by another poller
            if record.get('cancelled'):
                return 'cancelled', f'cancelled {name} {how}'
            ours = (queue.fail, queue.complete) if self.status is not None else ()
            return next((folder.name for folder in ours if os.path.lexists(folder / self.name)), ''), ''
        if code == 0:
            safe_rename(self.path, queue.complete)
            return 'complete', f'complete {name} {how}'
        if record.get('stopped') or (code is None and not unknown):
            path = safe_rename(self.path, queue.to_run, self.script)
            return 'to_run', f'requeue {name}' + f' as {shown(path.name)}' * (path.name != self.name) + f' {how}'
        path = safe_rename(self.path, queue.fail)
        reason = (missing_interpreter(path) if code == 127 else '') or last_line(self.out('stderr'))
        return 'fail', f'fail {name} {how}: {remark(reason, self.out("stderr"))}'


# --- Pools: which resources there are, and who has them ---------------------------------------------------------------

class ResourcePoolBase:
    """Runs the scripts of the queue in the folder `path`, each on one of the resources that `all_ids` names.

    A resource of your own is a subclass with `all_ids`, and where it needs them `is_available` and `environment`.
    Raises OSError or FastgpuError where there can be no queue in `path`. With `only_look`, for `status`, it makes and
    checks nothing.
    """
    kind = 'worker'  # what a resource is called in messages

    def __init__(self, path: StrPath, only_look: bool = False) -> None:
        fd = 0
        while fd <= 2:  # a lock in the place of a closed stdin would not be inherited
            fd = os.open(os.devnull, os.O_RDWR)
        os.close(fd)
        self.queue = Queue(path, only_look)
        self.path = self.queue.path
        self.wrapper: list[str] = []  # words to put in front of each script's path
        self.reasons: dict[Hashable, str] = {}  # why a resource was not free, or '', when we asked last
        self.retry_at = 0.0  # when to ask again, since it costs something, for what nobody has and is not available
        self._locks: dict[Hashable, int] = {}  # the resources that we hold, and the files that hold them
        self.poller = Poller(self)
        self.completed, self.failed, self.cancelled = self.poller.ended.values()

    # What a resource is: for a subclass to say.

    def all_ids(self) -> Iterable[Any]:
        """Return the resources, in order of preference."""
        raise NotImplementedError

    def is_available(self, ident: Any) -> bool:
        """Return whether `ident` can take a script.

        A subclass adds its own test to `super().is_available(ident)`. Before a script starts it is asked while nobody
        else can ask, so what it finds cannot be changed by another poller.
        """
        return ident not in self._locks and self._is_unlocked(ident)

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return the variables that a script on `ids` (mostly one) gets in addition to those of the poller."""
        return {'FASTGPU_ID': ','.join(map(str, ids))}

    def demand(self, script: StrPath) -> int:
        """Return how many resources `script` needs at once."""
        return 1

    def lock_path(self, ident: Any) -> Path:
        """Return the lock file of `ident`: here in the queue, and one per host, since the locks are."""
        return self.path / f'.{self.queue.host}-{ident}.lock'.replace('/', '_')

    def place(self, ident: Any) -> tuple[int, int]:
        """Return what `ident` is of its lock file: all of it, or one place of many."""
        return ALL

    # Who has it.

    def lock(self, ident: Any) -> bool:
        """Take the lock of `ident`; return whether we got it. It is ours until `unlock`, or until we end."""
        return ident not in self._locks and self._take(ident)

    def unlock(self, *ids: Any) -> None:
        """Give the locks of `ids` back, also if a daemon that a script left behind still has their files open."""
        for fd in self._forget(ids):
            lock_bytes(fd, (0, 0), fcntl.F_UNLCK)
            os.close(fd)

    def drop(self, *ids: Any) -> None:
        """Close our files of the locks of `ids`: whoever inherited them, if anybody did, still holds them."""
        for fd in self._forget(ids):
            os.close(fd)

    def held(self, *ids: Any) -> list[int]:
        """Return the files that hold `ids`, for a script to inherit. Raises FastgpuError if one cannot be locked."""
        for ident in ids:
            if ident not in self._locks and not self.lock(ident):
                raise FastgpuError(f'{self.kind} {ident} {self.reasons.get(ident) or "busy"}')
        return [self._locks[ident] for ident in ids]

    def find_next(self) -> Any:
        """Return the first resource that is available, or None."""
        return next((ident for ident in self.all_ids() if self.is_available(ident)), None)

    def lock_next(self) -> Any:
        """Lock the first resource that is available; return it, or None where there is none."""
        return next(iter(self.lock_some(1)), None)

    def lock_some(self, number: int) -> list[Any]:
        """Lock so many of the resources that are available, on as many lock files; all of them or none."""
        ids: list[Any] = []
        left = [ident for ident in self.all_ids() if ident not in self._locks]
        try:
            # Stop as soon as it cannot be done: two pollers that each hold a part would wait for each other.
            while len(ids) < number <= len(ids) + len(left):
                ident = left.pop(0)
                if self._take(ident, self.is_available):
                    ids.append(ident)
                    if number > 1:
                        left = [other for other in left if self.lock_path(other) != self.lock_path(ident)]
        finally:
            if len(ids) < number:
                self.unlock(*ids)
        return ids if len(ids) == number else []

    def look(self, ident: Any) -> dict[str, Any]:
        """Return the `state` of a resource, free, busy or unusable, and the `reason` where it is not free."""
        if self.is_available(ident):
            return {'state': 'free', 'reason': None}
        state, _, reason = (self.reasons.get(ident) or 'busy').partition(': ')
        if reason.startswith('runs '):
            reason += f' for {duration(time.time() - os.stat(self.lock_path(ident)).st_mtime)}'
        return {'state': state, 'reason': reason}

    def _is_unlocked(self, ident: Any) -> bool:
        """Return whether nobody has `ident`, and note who does."""
        self.reasons[ident] = why_locked(self.lock_path(ident), self.place(ident))
        return not self.reasons[ident]

    def _take(self, ident: Any, test: Callable[[Any], bool] | None = None) -> bool:
        """Lock `ident` if nobody has it and it passes the `test`; one poller at a time may ask that."""
        path, place = self.lock_path(ident), self.place(ident)
        fd = -1
        try:
            if not self._is_unlocked(ident):
                return False
            fd = open_lock(path)
            if not lock_file(fd, path, ASKING):
                return False
            if test and not test(ident):
                self.retry_at = time.monotonic() + LOOK_AROUND
            elif lock_bytes(fd, place):
                write_note(fd, place)  # what it says of whoever had it before is no longer so
                lock_bytes(fd, ASKING, fcntl.F_UNLCK)
                self._locks[ident] = fd
            return ident in self._locks
        except OSError as error:
            self.reasons[ident] = f'unusable: {explain(error)}'
            return False
        finally:
            if fd >= 0 and self._locks.get(ident) != fd:
                os.close(fd)

    def _forget(self, ids: Iterable[Any]) -> list[int]:
        """Return the files that hold those of `ids` that we hold, which we no longer do as far as we know."""
        return [self._locks.pop(ident) for ident in ids if ident in self._locks]

    # Running scripts on them.

    def run(self, script: StrPath, *ids: Any) -> bool:
        """Move `script` from to_run to running and start it on `ids` (mostly one), which are locked if they were not.

        Returns at once: whether it started, or was no longer there. `poll_scripts` files it when it has ended.
        Raises FastgpuError where the script can never run, OSError where the machine cannot start it now; it is in
        to_run then.
        """
        return self.poller.run(script, ids)

    def poll_scripts(self, poll_interval: float = 0.1, exit_when_empty: bool = True) -> int:
        """Run the scripts of to_run, each on a resource of its own, and file them when they have ended.

        Looks every `poll_interval` seconds, and at the moment a script ends. With `exit_when_empty` it returns when
        nothing is left to run and nothing of this queue runs on this host; else it goes on until it is stopped by
        `interrupt`. What runs at an exception goes on, and is filed by the next call or the next poller.

        Returns 0 if all ended well, 1 if a script failed or was left in to_run, 128+N if it was stopped by signal N.
        Raises OSError where the queue cannot be read.
        """
        return self.poller.poll_scripts(poll_interval, exit_when_empty)

    def interrupt(self, signum: int) -> None:
        """Stop `poll_scripts`; made to be called by a signal handler.

        SIGINT once: start nothing more, wait for what runs. A second time, or any other signal: TERM to the session of
        each script, KILL after 10 s; what does not end well goes back to to_run.
        """
        self.poller.signals.append(signum)


class FixedWorkerPool(ResourcePoolBase):
    """Runs scripts on a fixed list of slots, `worker_ids`; two pollers of a queue on one host share them."""

    def __init__(self, worker_ids: Iterable[Any], path: StrPath, only_look: bool = False) -> None:
        super().__init__(path, only_look)
        self.worker_ids = list(worker_ids)
        if not self.worker_ids and not only_look:
            raise FastgpuError('a pool needs at least one worker')

    def all_ids(self) -> list[Any]:
        """Return the slots."""
        return self.worker_ids


# --- Poller: the loop, from to_run to complete and fail ---------------------------------------------------------------

class Poller:
    """Runs the scripts of a queue on the resources of a pool, and files those of others that have ended."""

    def __init__(self, pool: ResourcePoolBase) -> None:
        self.pool, self.queue = pool, pool.queue
        self.runs: dict[str, Run] = {}  # what runs or is to be filed, by name
        self.ended: dict[str, list[str]] = {'complete': [], 'fail': [], 'cancelled': []}  # since `began`
        self.signals: list[int] = []
        self.said: dict[Hashable, str] = {}  # what was last logged about what, see `say`
        self.unfit: dict[Hashable, str] = {}  # why a script in to_run, as long as it is the same file, can never start
        self.cuts: dict[str, int] = {}  # how often a script was cut off under our eyes
        self.many_hosts = os.environ.get('SLURM_STEP_NUM_NODES', '1') != '1'  # srun(1); or we see another one's run
        self.names: list[str] = []  # what is left of the last list of to_run, backwards
        self.passed: dict[str, str] = {}  # what of that list was passed over, and why
        self.list_at = 0.0  # when the next one is due at the earliest
        self.changed = 0  # the time stamp of to_run when it was made
        self.look_at = self.start_at = self.ask_at = 0.0  # when to look around, start scripts, ask for resources again
        self.filed_at = 0.0
        self.stop_at: float | None = None
        self.began = time.time()
        self.busy_seconds = 0.0  # of all resources together, since then
        self.seconds = 0.0  # that the runs took that have ended since then

    def poll_scripts(self, poll_interval: float, exit_when_empty: bool) -> int:
        """Do what `ResourcePoolBase.poll_scripts` says."""
        self.began, self.busy_seconds, self.seconds = time.time(), 0.0, 0.0
        for names in self.ended.values():
            names.clear()
        self.changed, self.list_at, self.look_at = 0, 0.0, 0.0
        alive = -1
        try:
            self.list_scripts()
            with contextlib.suppress(OSError):
                alive = open_lock(self.queue.alive)
                lock_bytes(alive, ALL, fcntl.F_RDLCK)
            while not self.turn(exit_when_empty):
                log.bottom(self.progress())
                self.sleep(poll_interval)
        finally:
            log.bottom('')
            if alive >= 0:
                os.close(alive)
        return self.sum_up(time.time() - self.began)

    def turn(self, exit_when_empty: bool) -> bool:
        """Look once at all there is, and do what is to be done; return whether that was all."""
        freed = self.release()
        idle = self.is_idle()
        looked = time.monotonic() >= self.look_at
        if looked:
            self.look_around()
        # The next scripts start before those that have ended are filed, so that no resource waits for that.
        self.start(hurry=freed)
        self.file()
        if self.signals:
            return self.stop()
        if self.runs or self.has_waiting() or not exit_when_empty:
            return False
        if not (idle and looked):
            self.look_at = 0.0  # end only after one more look around, which may requeue something
        return idle and looked

    def sleep(self, seconds: float) -> None:
        """Wait until a script of ours ends, but no longer than so many seconds."""
        waiter = select.poll()
        for run in self.runs.values():
            if run.is_alive and run.pidfd >= 0:
                waiter.register(run.pidfd, select.POLLIN)
        waiter.poll(seconds * 1000 if self.look_at else 0)

    # What waits in to_run.

    def list_scripts(self) -> None:
        """List to_run if that is due. Raises OSError.

        To list a long queue takes longer than to start a script of it. So a list serves for six times as long as it
        took to make, and to the next look around while the folder seems unchanged: its time stamp is too coarse to
        tell each change.
        """
        began = time.monotonic()
        if began < self.list_at:
            return
        changed = os.stat(self.queue.to_run).st_mtime_ns
        if changed == self.changed and not self.passed:
            return
        self.names = names_in(self.queue.to_run)[::-1]
        self.passed.clear()
        self.changed = changed
        self.list_at = began + 7 * (time.monotonic() - began)

    def has_waiting(self) -> bool:
        """Return whether something in to_run waits for a resource, or only for a moment."""
        return bool(self.names) or FRESH in self.passed.values() or ENDING in self.passed.values()

    def start(self, hurry: bool) -> None:
        """Start what can be started.

        In a `hurry`, because a resource just became free, to_run is listed only if nothing is left of the last list.
        """
        while self.start_at <= time.monotonic() < self.look_at and not self.signals:
            if not (hurry and self.names):
                self.list_scripts()
            name = self.next_script()
            if name is None:
                return
            try:
                if not self.start_one(name):
                    return
                self.names.pop()
                self.said.pop(name, None)
            except FastgpuError as error:
                self.unfit[name, file_mark(self.queue.to_run / name)] = str(error)
            except OSError as error:
                self.cannot_start(name, explain(error))

    def next_script(self) -> str | None:
        """Return the name of the first script in to_run that can start; pass those over that cannot, and say why."""
        while self.names:
            name = self.names[-1]
            reason = condition(f'{self.queue.to_run}/{name}') or self.why_unfit(name)
            # A person who moves a running script back to to_run ends that run, and it starts anew when that has ended.
            if not reason and any(name in (run.name, run.script) and (run.kill_at or run.taken_out())
                                  for run in self.runs.values()):
                reason = ENDING
            if not reason:
                return name
            self.names.pop()
            if reason == IGNORED:
                continue
            self.passed[name] = reason
            path = shown(near(self.queue.to_run / name))
            if reason == NOT_EXECUTABLE:
                self.say(name, f'{path} waits for its chmod +x')
            elif reason not in (FRESH, ENDING):
                self.say(name, f'{path} cannot run: {reason}')
        return None

    def why_unfit(self, name: str) -> str:
        """Return why the script `name` of to_run can never start, '' where nothing is known or the file is another."""
        return self.unfit.get((name, file_mark(self.queue.to_run / name)), '') if self.unfit else ''

    def start_one(self, name: str) -> bool:
        """Start the script `name` of to_run if what it needs is free, else say why not; return whether it was."""
        pool = self.pool
        if time.monotonic() < self.ask_at:
            return False
        number = pool.demand(self.queue.to_run / name)
        most = len(set(map(pool.lock_path, pool.all_ids()))) if number > 1 else 1
        if number > most:
            reason = f'{shown(name)} asks for {number} {pool.kind}s, and there {"are" if most != 1 else "is"} {most}'
            self.say(name, reason)
            self.run(name, (), refusal=reason)
            return True
        ids = pool.lock_some(number)
        if self.signals:  # a driver can take seconds for its answers
            pool.unlock(*ids)
            return False
        for ident in pool.all_ids():
            if not pool.reasons.get(ident):
                self.said.pop((pool.kind, ident), None)
            elif not ids:
                self.say((pool.kind, ident), f'{self.where([ident])} {pool.reasons[ident]}')
        if ids:
            self.run(name, ids)
            return True
        self.ask_at = pool.retry_at
        if number > 1:
            self.say(name, f'{shown(name)} waits for {number} {pool.kind}s at once, and all behind it wait too')
            # For a time of our own, so that pollers that each got a part of what they want do not meet again.
            self.ask_at = time.monotonic() + LOOK_AROUND * (0.5 + os.urandom(1)[0] / 256)
        return False

    def cannot_start(self, name: str, reason: str) -> None:
        """Say that a script cannot be started now, and start none for a while."""
        self.say('/start', f'cannot start {shown(name)} now: {reason}; trying again')
        self.start_at = time.monotonic() + LOOK_AROUND

    # The life of a script: it is claimed and launched, what it held is released, and it is filed.

    def run(self, script: StrPath, ids: Sequence[Any], refusal: str = '') -> bool:
        """Do what `ResourcePoolBase.run` says; with a `refusal` a shell that prints that and fails in its place."""
        pool = self.pool
        taken = [ident for ident in ids for run in self.runs.values() if ident in run.held]
        if taken:
            raise FastgpuError(f'{self.where(taken)} is in use')
        run = None
        try:
            locks = pool.held(*ids)
            environment = {'PYTHONUNBUFFERED': '1', **os.environ, **pool.environment(*ids)}
            run = self.queue.claim(os.path.basename(script), pool.kind, ids)
            if not run:
                return False
            self.runs[run.name] = run  # even if a KeyboardInterrupt comes now, it is seen to
            refuse = ['/bin/sh', '-c', 'echo "fastgpu: $1" >&2; exit 1', 'fastgpu', refusal]
            run.launch(refuse if refusal else [*pool.wrapper, run.path], locks, environment)
        except OSError:
            if run:
                del self.runs[run.name]
                run.unclaim()
            raise
        finally:
            if not (run and run.process):
                pool.drop(*ids)
        run.held, run.is_new = ids, True
        for ident, fd in zip(ids, locks):
            write_note(fd, pool.place(ident),
                       f'runs {run.name} of user {os.getuid()} (pid {run.record["pid"]}, {self.queue.path})')
        return True

    def release(self) -> bool:
        """Give back what those scripts of ours held that have ended; return whether that was anything."""
        freed = False
        for run in self.runs.values():
            run.kill()
            if not (run.process and run.is_alive) or run.process.poll() is None:
                continue
            code = run.process.returncode
            if run.pidfd >= 0:
                os.close(run.pidfd)
            if code >= 0:
                self.pool.unlock(*run.held)
                self.cuts.pop(run.script, None)
                run.status = code
            else:
                # Its shim was killed before it could write. Its script may live: when its locks end is for the kernel,
                # and from here on it is a run that we found. One that kills its own group each time would go round
                # for ever: the second time counts as its end.
                self.pool.drop(*run.held)
                run.close_record()
                run.process = None
                self.cuts[run.script] = self.cuts.get(run.script, 0) + (run.kill_at is None)
                run.status = 128 - code if self.cuts[run.script] > 1 else None
            run.held = ()  # from here on they may be another run's
            self.ask_at = 0.0  # perhaps that is all that the next script needs
            freed = True
        return freed

    def look_around(self) -> None:
        """See to all runs in running/, whoever started them, and list to_run even if it seems unchanged."""
        for name in names_in(self.queue.running):
            self.runs.setdefault(name, Run(self.queue, name))
        self.file(others=True)
        self.changed = 0
        if not self.runs:
            self.list_at = 0.0  # before the end, a script that came just now is not to be overlooked
        self.list_scripts()
        self.look_at = time.monotonic() + LOOK_AROUND

    def file(self, others: bool = False) -> None:
        """File the runs that have ended, and end those that a person took out of running/; `others`: not only ours."""
        self.filed_at = time.monotonic()
        for run in list(self.runs.values()):
            if not run.process and not others:
                continue
            if run.is_new:
                run.is_new = False
                log(f'{self.where(run.ids)}: start {shown(run.name)}')
            try:
                done = self.see_to(run)
            except OSError as error:
                self.say(run.path, f'cannot file {shown(run.name)} now: {explain(error)}; trying again')
                with contextlib.suppress(OSError):
                    setup_dirs(self.queue.path)  # one of them may be gone
                continue
            if done:
                run.close_record()
                del self.runs[run.name]

    def keep_up(self) -> None:
        """File the runs that have ended, if it took long since we did: a driver can take seconds for an answer."""
        if time.monotonic() > self.filed_at + 0.1:
            self.release()
            self.file()

    def see_to(self, run: Run) -> bool:
        """Do for a run what its state asks for; return whether there is nothing more to do. Raises OSError."""
        state = run.state()
        if state == ENDED:
            return self.settle(run)
        if state == RUNS and not run.kill_at and run.taken_out() and run.shim() and run.exit_code()[0] is None:
            log(f'{self.where(run.ids)}: cancel {shown(run.name)}, taken out of running')
            run.terminate('cancelled')
        self.many_hosts |= state == ELSEWHERE
        if self.is_idle() and os.path.lexists(run.path):
            self.say(run.path, run.advice(state))
        return state != RUNS

    def is_idle(self) -> bool:
        """Return whether there is nothing to do for us but to wait for the runs of others."""
        return not (self.has_waiting() or self.signals or any(run.process for run in self.runs.values()))

    def settle(self, run: Run) -> bool:
        """File a run that has ended; return whether that is done, else it is to be called again. Raises OSError."""
        if run.status == NOT_STARTED and last_line(run.out('stderr')) == NO_PROCESS:
            self.cannot_start(run.name, 'no process to be had for it')
            run.unclaim()
            return True
        code, finished = run.exit_code()
        age = time.time() - finished
        if not run.process and not lock_file(run.fd, run.out('json')) and age <= OVERDUE:
            return False  # another poller is about to
        # Slurm, or a box that shuts down, sends TERM to all processes at once, to some of them a moment earlier than to
        # us: what it ended goes back to to_run.
        if (code or run.status) and not run.record.keys() & {'cancelled', 'finished'}:
            if self.stopping() and age < 1:
                run.record['stopped'] = True
            elif code == 128 + signal.SIGTERM and not self.signals and 0 <= age < 0.5:
                return False  # too early to tell
        folder, text = run.settle(code, finished)
        if text:
            log(f'{self.where(run.ids)}: {text}', alarm=folder == 'fail')
        if folder in self.ended:
            self.ended[folder].append(run.name)
            self.seconds += run.seconds()
        self.busy_seconds += run.seconds(self.began) * len(run.ids)
        return True

    # Signals.

    def stopping(self) -> bool:
        """Return whether scripts are to be stopped, not only no more to be started."""
        return bool(self.signals) and self.signals != [signal.SIGINT]

    def stop(self) -> bool:
        """Do what the signals so far ask for; return whether it is done."""
        # Ours that run; one that has ended and cannot be filed now is for the next poller.
        alive = [run for run in self.runs.values() if run.is_alive]
        if not self.stopping():
            if alive and '/stop' not in self.said:
                self.say('/stop', f'interrupted: waiting for {count(len(alive), "script")}; Ctrl-C again stops them')
            return not alive
        first = self.stop_at is None
        if self.stop_at is None:
            self.stop_at = time.monotonic()
            if alive:
                log(f'stopping {count(len(alive), "script")}: TERM now, KILL in {GRACE:.0f} s')
        for run in alive:
            if run.kill_at is None and run.exit_code()[0] is None:
                run.terminate('stopped')
        self.look_at = time.monotonic()  # at the scripts of others in each turn: they may have got TERM too
        alive += [run for run in self.runs.values() if not run.process and run.kill_at is not None]
        return not (first or alive) or time.monotonic() > self.stop_at + 2 * GRACE

    # Words.

    def where(self, ids: Iterable[Any]) -> str:
        """Return where a run runs, for the log: `gpu 0`, and of which host where several take part."""
        return shown(f'{self.queue.host} ' * self.many_hosts + f'{self.pool.kind} {",".join(map(str, ids)) or "-"}')

    def say(self, about: Hashable, text: str) -> None:
        """Log `text` unless it is what was last said about this, but for amounts of memory, which always change.

        `about` is a resource, a script in to_run by its name, a run by its path, or another word with a slash in it.
        """
        gist = re.sub(r'[0-9.]+ [MG]iB', '', text)
        if self.said.get(about) != gist:
            self.said[about] = gist
            log(text)

    def sum_up(self, seconds: float) -> int:
        """Log what was done and what was left; return the exit status."""
        pool, failed = self.pool, self.ended['fail']
        left = scripts_in(self.queue.to_run)
        if not self.signals:
            for name, reason in left.items():
                log(f'left in to_run: {shown(name)} ({reason or self.why_unfit(name) or "new"})')
        done = sum(map(len, self.ended.values()))
        if done or left:
            log(f'{shown(self.queue.host)}: ' * self.many_hosts + f'{count(done, "script")} in {duration(seconds)}: '
                + ', '.join(f'{len(names)} {how}' for how, names in self.ended.items() if names or how != 'cancelled')
                + f', {len(left)} left in to_run' * bool(left))
        else:
            log(f'nothing to run in {shown(self.queue.to_run)}')
        if done:
            share = min(1.0, self.busy_seconds / max(0.001, seconds) / len(list(pool.all_ids())))
            log(f'{duration(self.busy_seconds)} of {pool.kind} time used, {pool.kind}s busy {share:.0%} of the time')
        if failed:
            more = f' and {len(failed) - 10} more' * (len(failed) > 10)
            log(f'failed: {shown(shlex.join(failed[:10]))}{more}', alarm=True)
        if self.signals:
            return 128 + self.signals[-1]
        return 1 if failed or left else 0

    def progress(self) -> str:
        """Return in one line how far this poller is."""
        done, running = sum(map(len, self.ended.values())), len(self.runs)
        waiting = 0 if self.signals else len(self.names)
        failed = f'done ({len(self.ended["fail"])} failed)'
        if not (running or waiting):
            return f'{done} {failed}, waiting for scripts'
        text = f'{done}/{done + running + waiting} {failed}, {running} running'
        if done and running:
            now = time.time()
            seconds = self.seconds + sum(now - run.record.get('started', now) for run in self.runs.values())
            text += f', about {duration(time_left(seconds / (done + running), waiting, running))} left'
        return text


# --- GPUs: what the driver says of them, and which of them nobody uses ----------------------------------------------

class GpuError(Exception):
    """Why a GPU cannot be used, in the driver's words."""


class DriverError(GpuError):
    """Why none of them can be."""


class Gpu:
    """A GPU, or an instance of one in MIG mode. Where `error` is not empty, it cannot be used."""

    def __init__(self, index: int, uuid: str = '', model: str = '', parent: str = '', error: str = '') -> None:
        self.index, self.uuid, self.model, self.parent, self.error = index, uuid, model, parent, error
        self.ident: Any = index  # what CUDA is told, and people


class Nvml:
    """The driver, by way of nvidia-ml-py. Raises ImportError without it."""

    def __init__(self) -> None:
        import pynvml  # here, because a pool of another kind needs none
        if not hasattr(pynvml, 'nvmlMemory_v2'):
            raise ImportError('the module pynvml is too old')
        self._nvml: Any = pynvml
        self._up = False
        self._blind = False

    @contextlib.contextmanager
    def _asking(self, gpu: Gpu | None = None) -> Iterator[Any]:
        """Ask about a GPU, by its handle, in a `with` block. Raises DriverError if the driver is gone, else GpuError.

        A driver that comes back has to be initialised again, and its old handles mean nothing then: so there are
        none, a GPU is looked up by its UUID for each question.
        """
        nvml = self._nvml
        try:
            if not self._up:
                nvml.nvmlInit()
            self._up = True
            yield nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) if gpu else None
        except nvml.NVMLError as error:
            if self._up and error.value not in (nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                                                nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH):
                raise GpuError(str(error)) from None
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
            self._up = False
            raise DriverError(str(error)) from None

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, in NVML's order, those in MIG mode as their instances. Raises GpuError."""
        with self._asking():
            number = self._nvml.nvmlDeviceGetCount()
        found = []
        for index in range(number):
            try:
                with self._asking():
                    handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                    gpu = Gpu(index, *self._name(handle))
                    instances = self._instances(handle)
                    if instances == []:
                        gpu.error = 'is in MIG mode and has no instances (see nvidia-smi mig)'
                    found += [Gpu(index, *self._name(each), gpu.uuid) for each in instances or ()] or [gpu]
            except GpuError as error:
                found.append(Gpu(index, error=str(error)))
        return found

    def _name(self, handle: Any) -> tuple[str, str]:
        """Return the UUID and the model, which is for people only, of a GPU or an instance."""
        uuid = str(self._nvml.nvmlDeviceGetUUID(handle))
        with contextlib.suppress(self._nvml.NVMLError):
            return uuid, str(self._nvml.nvmlDeviceGetName(handle))
        return uuid, ''

    def _instances(self, handle: Any) -> list[Any] | None:
        """Return the handles of the MIG instances of a GPU, None if it is not in MIG mode."""
        nvml = self._nvml
        try:
            current, _ = nvml.nvmlDeviceGetMigMode(handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # most cards; drivers before 450
            return None
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
        instances = []
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):  # a capacity, with gaps
            with contextlib.suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        return instances

    def memory(self, gpu: Gpu) -> tuple[float, float]:
        """Return the memory of a GPU in use, and all it has, in MiB. Raises GpuError."""
        nvml = self._nvml
        with self._asking(gpu) as handle:
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            except nvml.NVMLError_FunctionNotFound:  # drivers before 510, where what the driver reserves counts as used
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.used / 2**20, memory.total / 2**20

    def pids(self, gpu: Gpu) -> list[int]:
        """Return the pids of the compute processes on a GPU, as its driver counts them. Raises GpuError."""
        nvml = self._nvml
        for _ in range(5):  # the list can grow between the two calls that nvidia-ml-py makes
            with self._asking(gpu) as handle, contextlib.suppress(nvml.NVMLError_InsufficientSize):
                try:
                    try:  # not the function without a version: it refuses to work on drivers before 510
                        processes = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
                    except nvml.NVMLError_FunctionNotFound:
                        processes = nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
                    return [process.pid for process in processes]
                except nvml.NVMLError_NotSupported:
                    if not self._blind:
                        self._blind = True
                        log(f'gpu {gpu.ident} does not tell its processes: its memory alone says whether it is free')
                    return []
        raise GpuError('its list of processes keeps growing')


class NvidiaSmi:
    """The driver, by way of the command nvidia-smi: slower, and without MIG. Raises DriverError where there is none."""

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, in the order of nvidia-smi. Raises DriverError."""
        try:
            rows = self._csv('--query-gpu=index,uuid,name,mig.mode.current')
        except DriverError:
            rows = [[*row, ''] for row in self._csv('--query-gpu=index,uuid,name')]  # drivers before 450 know no MIG
        found = []
        for row in rows:
            if len(row) != 4 or not re.fullmatch('[0-9]{1,9}', row[0]):
                raise DriverError('nvidia-smi says: ' + ', '.join(row))
            index, uuid, model, mig = row
            error = '' if uuid.startswith('GPU-') else uuid
            if mig == 'Enabled':
                error = 'is in MIG mode, for which this needs nvidia-ml-py (pip install nvidia-ml-py)'
            found.append(Gpu(int(index), uuid, model, error=error))
        return found

    def memory(self, gpu: Gpu) -> tuple[float, float]:
        """Return the memory of a GPU in use, and all it has, in MiB. Raises GpuError."""
        for row in self._csv('--query-gpu=memory.used,memory.total', '-i', gpu.uuid):
            try:
                used, total = map(float, row)
                return used, total
            except ValueError:
                raise GpuError(' '.join(row)) from None
        raise GpuError('not found')

    def pids(self, gpu: Gpu) -> list[int]:
        """Return the pids of the compute processes on a GPU. Raises GpuError."""
        rows = self._csv('--query-compute-apps=gpu_uuid,pid', '-i', gpu.uuid)
        try:
            return [int(pid) for _, pid in rows]
        except ValueError:
            raise GpuError(f'nvidia-smi tells its processes as: {", ".join(rows[0])}') from None

    def _csv(self, query: str, *args: str) -> list[list[str]]:
        """Return the rows that nvidia-smi answers to a query. Raises DriverError with what it says instead.

        With `args`, which ask for one GPU, GpuError where it says that of this GPU only.
        """
        command = ['nvidia-smi', query, '--format=csv,noheader,nounits', *args]
        try:
            # In a session of its own, so that Ctrl-C in our terminal is not for it.
            run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace',
                                 timeout=30, start_new_session=True)
        except OSError as error:
            raise DriverError(f'nvidia-smi: {error.strerror}') from None
        except subprocess.TimeoutExpired:
            raise DriverError('nvidia-smi does not answer') from None
        lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
        if run.returncode not in (0, 14):  # 14 is a warning about the infoROM, nvidia-smi(1)
            reason = ' '.join((run.stderr.strip() or run.stdout.strip()).split('\n')[:1]) or f'status {run.returncode}'
            if args:
                self._csv('--query-gpu=index')  # if that works, it is this GPU alone
                raise GpuError(reason)
            raise DriverError(reason)
        return [[field.strip() for field in line.split(',')] for line in lines]


def find_driver() -> tuple[Nvml | NvidiaSmi, list[Gpu]]:
    """Return the way to ask the driver, and its GPUs. Raises FastgpuError where there are none."""
    instead = 'use --workers N to run without GPUs'
    try:
        driver: Nvml | NvidiaSmi = Nvml()
    except ImportError:
        driver = NvidiaSmi()
        if not shutil.which('nvidia-smi'):
            raise FastgpuError('no NVIDIA driver found: install the driver, which brings nvidia-smi, or if it is here '
                               f'pip install nvidia-ml-py; {instead}') from None
        log('asking nvidia-smi, which is slower and knows no MIG: pip install nvidia-ml-py')
    try:
        gpus = driver.gpus()
    except GpuError as error:
        raise FastgpuError(f'no NVIDIA driver found ({shown(error)}); {instead}') from None
    if not gpus:
        raise FastgpuError(f'the NVIDIA driver shows no GPU; {instead}')
    return driver, gpus


def visible_gpus(gpus: list[Gpu], listed: str | None) -> list[Gpu]:
    """Return those of `gpus` that the value `listed` of CUDA_VISIBLE_DEVICES (None: not set) makes visible.

    The grammar is CUDA's (CUDA C++ Programming Guide, "CUDA Environment Variables"): numbers, and UUIDs or unique
    beginnings of them; the first entry that names no GPU ends the list. The number of a GPU in MIG mode stands for
    all its instances. Sets the `ident` of the GPUs it returns: the UUID where a number could mislead CUDA. Raises
    FastgpuError where nothing is visible, and for what is ambiguous or named twice.
    """
    chosen = gpus if listed is None else []
    entries = [] if listed is None else [entry.strip() for entry in listed.split(',')]
    what = f'CUDA_VISIBLE_DEVICES={shown(listed)}'
    for number, entry in enumerate(entries):
        if re.fullmatch('[0-9]{1,9}', entry):
            matches = [gpu for gpu in gpus if gpu.index == int(entry)]
        elif entry.startswith(('GPU-', 'MIG-')):
            matches = [gpu for gpu in gpus if gpu.uuid.startswith(entry) or gpu.parent.startswith(entry)]
            devices = sorted({gpu.uuid if gpu.uuid.startswith(entry) else gpu.parent for gpu in matches})
            if len(devices) > 1 and entry not in devices:
                raise FastgpuError(f'{what}: {shown(entry)} could be ' + ' or '.join(devices))
        else:
            matches = []
        if any(gpu in chosen for gpu in matches):
            raise FastgpuError(f'{what} names {shown(entry)} twice')
        if not matches:
            if number and entries[number:] != ['']:
                log(f'{what}: there is no GPU "{shown(entry)}"; it and all behind it are left out, as CUDA does')
            break
        chosen += matches
    if not chosen:
        raise FastgpuError(f'{what} hides all GPUs' + f' (there is no GPU "{shown(entries[0])}")' * bool(entries[0])
                           + '; unset it, or use --workers N to run without GPUs')
    by_uuid = any(gpu.parent or gpu.error for gpu in gpus) or any(entry[:4] in ('GPU-', 'MIG-') for entry in entries)
    for gpu in chosen:
        gpu.ident = gpu.uuid if by_uuid and gpu.uuid else gpu.index
        if gpu.error:
            log(f'gpu {gpu.ident} unusable: {gpu.error}')
    usable = [gpu for gpu in chosen if not gpu.error]
    if not usable:
        raise FastgpuError('no GPU is usable: ' + '; '.join(f'gpu {gpu.ident}: {gpu.error}' for gpu in chosen))
    return usable


def gpus_wanted(script: StrPath) -> int:
    """Return how many GPUs a script asks for in its #SBATCH lines, 1 where it does not.

    They are those of sbatch(1): --gpus, -G, --gres=gpu and --gpus-per-node, in the comments above the first command.
    Raises FastgpuError where one of them has no number.
    """
    wanted = {}
    try:
        with open(script, 'rb') as file:
            head = file.read(1 << 16).decode('utf-8', 'replace')
    except OSError:
        return 1
    for line in itertools.takewhile(lambda line: line.startswith('#') or not line.strip(), head.splitlines()):
        asked = re.sub(r'\s#.*', '', line[7:]) if re.match(r'#SBATCH\s', line) else ''
        for option, value in re.findall(r'\s(--gpus-per-node|--gpus|--gres|-G)(?:[=\s]\s*|(?=\d))(\S+)', asked):
            numbers = []
            for part in value.split(','):  # 2, a100:2; for --gres also gpu, gpu:a100, gpu:a100:2, and what is no GPU
                *_, number = part.split(':')
                if option != '--gres':
                    numbers.append(number)
                elif re.match('gpu(:|$)', part):
                    numbers.append(number if number.isdecimal() else '1')
            if not all(re.fullmatch('[0-9]{1,6}', number) for number in numbers):
                raise FastgpuError(f'its line "{shown(line.strip())}" does not say how many GPUs')
            wanted[option] = sum(map(int, numbers))
    return max([1, *wanted.values()])


def memory_text(mib: float) -> str:
    """Return an amount of memory as people read it: `512 MiB`, `23.1 GiB`."""
    return f'{mib:.0f} MiB' if mib < 1024 else f'{mib / 1024:.1f} GiB'


def process_text(pid: int) -> str:
    """Return `pid 4121 (python, user 1001)`, or the pid alone where the rest cannot be seen, as in a container."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/comm', errors='replace') as file:
        return shown(f'pid {pid} ({file.read().strip()}, user {os.stat(f"/proc/{pid}").st_uid})')
    return f'pid {pid}'


class ResourcePoolGPU(ResourcePoolBase):
    """Runs scripts on the GPUs of this host, or on those of them that CUDA_VISIBLE_DEVICES lists.

    A GPU is free while nobody holds its lock, no compute process is on it, and at most `max_used` MiB of its memory
    are in use. With `per_gpu` N, up to N scripts share one: each but the first needs 1/N of its memory to be free.
    Raises FastgpuError where there are no GPUs.
    """
    kind = 'gpu'

    def __init__(self, path: StrPath, max_used: float = 1024, per_gpu: int = 1, only_look: bool = False) -> None:
        self._driver, gpus = find_driver()
        gpus = visible_gpus(gpus, os.environ.get('CUDA_VISIBLE_DEVICES'))
        self._lock_folder = os.environ.get('FASTGPU_LOCK_DIR') or '/tmp'
        if not os.path.isabs(self._lock_folder):
            raise FastgpuError('FASTGPU_LOCK_DIR has to be the same for all: give it an absolute path')
        super().__init__(path, only_look)  # not before it is clear that there are GPUs: it makes folders
        self.max_used, self.per_gpu = max_used, per_gpu
        # The n-th place on GPU 3 is 3 itself, then 3.1, 3.2: first one script on each, then a second.
        self._places = {f'{gpu.ident}.{n}' if n else gpu.ident: (gpu, n) for n in range(per_gpu) for gpu in gpus}

    def all_ids(self) -> list[Any]:
        """Return the GPUs: their numbers, in NVML's order or in that of CUDA_VISIBLE_DEVICES, or UUIDs."""
        return list(self._places)

    def demand(self, script: StrPath) -> int:
        """Return how many GPUs the script asks for. Raises FastgpuError where it asks for no number of them."""
        return gpus_wanted(script)

    def lock_path(self, ident: Any) -> Path:
        """Return the lock file of a GPU, which all users of the host share."""
        return Path(self._lock_folder, f'fastgpu-{self._places[ident][0].uuid}.lock'.replace('/', '_'))

    def place(self, ident: Any) -> tuple[int, int]:
        """Return the place on the GPU; a script that shares it with no other has them all."""
        return (self._places[ident][1], 1) if self.per_gpu > 1 else ALL

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return FASTGPU_ID and what makes CUDA see these GPUs alone, counted as NVML counts."""
        gpus = ','.join(str(self._places[ident][0].ident) for ident in ids)
        return {'FASTGPU_ID': gpus, 'CUDA_VISIBLE_DEVICES': gpus, 'CUDA_DEVICE_ORDER': 'PCI_BUS_ID'}

    def is_available(self, ident: Any) -> bool:
        """Return whether nobody has the GPU, and the driver says that it is free. Where it is not, the log tells why.

        Between the questions it files what has ended, since a driver can take seconds for an answer.
        """
        if not super().is_available(ident):
            return False
        gpu = self._places[ident][0]
        try:
            used, total = self._driver.memory(gpu)
            self.poller.keep_up()
            pids = self._driver.pids(gpu)
            self.poller.keep_up()
            if self.poller.said.pop('/driver', None):
                self._welcome_back()
            shared = why_locked(self.lock_path(ident))  # by scripts that have other places on it
        except DriverError as error:
            self.poller.say('/driver', f'the NVIDIA driver is gone ({shown(error)}): nothing starts until it is back')
            return False
        except GpuError as error:
            self.reasons[ident] = f'unusable: {shown(error)}'
            return False
        if shared:
            busy = total - used < total / self.per_gpu
            rule = f'; one more script needs {memory_text(total / self.per_gpu)} of {memory_text(total)} free'
        else:
            busy = bool(pids) or used > self.max_used
            rule = '' if pids else f'; free is up to {memory_text(self.max_used)}'
        if busy:
            users = ', '.join(map(process_text, pids)) or 'no compute process'
            self.reasons[ident] = f'busy: {memory_text(used)} used by {users}{rule}'
        return not busy

    def _welcome_back(self) -> None:
        """Tell that the driver is back, and name the GPUs by UUID if it counts them in another way now."""
        log('the NVIDIA driver is back')
        numbers = {gpu.uuid: gpu.index for gpu in self._driver.gpus()}
        gpus = [gpu for gpu, _ in self._places.values()]
        if any(numbers.get(gpu.uuid) != gpu.index for gpu in gpus):
            for gpu in gpus:
                gpu.ident = gpu.uuid

    def look(self, ident: Any) -> dict[str, Any]:
        """Return whether a GPU is free, why if not, its model and its memory."""
        gpu = self._places[ident][0]
        seen: dict[str, Any] = {'model': gpu.model, 'memory_used': None, 'memory_total': None, **super().look(ident)}
        with contextlib.suppress(GpuError):
            seen['memory_used'], seen['memory_total'] = map(round, self._driver.memory(gpu))
        return seen


# --- Status: what there is to see, for everybody who may read the folders -------------------------------------------

def look_at_queue(pool: ResourcePoolBase) -> dict[str, Any]:
    """Return the state of the queue of `pool`: what `fastgpu_poll --status --json` prints, see the README.

    Takes nothing and changes nothing. Raises OSError where a folder cannot be read.
    """
    queue = pool.queue
    waiting = scripts_in(queue.to_run)
    names = {folder.name: names_in(folder) for folder in (queue.running, queue.complete, queue.fail)}
    alive = bool(why_locked(queue.alive))
    rows = {f'{pool.kind} {ident}': {'kind': pool.kind, 'id': ident, 'script': None, 'user': None, 'seconds': None,
                                     **pool.look(ident)} for ident in pool.all_ids()}
    runs, elsewhere = [], []
    for name in names['running']:
        run, state = look_at_run(queue, name)
        runs.append(run)
        if run['host'] != queue.host:
            elsewhere.append(run)
            continue
        for ident in run['ids']:
            row = rows.setdefault(f'{run["kind"]} {ident}', {'kind': run['kind'] or 'resource', 'id': ident})
            row.update({key: run[key] for key in ('script', 'user', 'seconds')}, state='running', reason=None)
            if state == ENDED:
                row.update(state='ended', seconds=None, reason='the next fastgpu_poll files it')
    ended = names['complete'] + names['fail']
    some = [look_at_run(queue, name)[0] for name in ended[::len(ended) // 100 + 1]]
    known = [run['seconds'] for run in some + runs if run['seconds'] is not None]
    left = None
    if alive and ended and known and (waiting or runs):
        left = round(time_left(sum(known) / len(known), len(waiting), len(runs) or len(rows)), 1)
    last = sorted(names['fail'], key=lambda name: (file_mark(queue.fail / name)[2:], name), reverse=True)[:3]
    return {
        'path': str(queue.path), 'host': queue.host, 'poller': alive, 'resources': list(rows.values()),
        'elsewhere': elsewhere,
        'counts': {'to_run': len(waiting), **{folder: len(scripts) for folder, scripts in names.items()}},
        'next': [name for name, reason in waiting.items() if reason in ('', FRESH)][:3],
        'failed': [{'script': run.name, 'stderr': run.out('stderr'), 'last_line': last_line(run.out('stderr'))}
                   for run in (Run(queue, name) for name in last)],
        'seconds_left': left}


def look_at_run(queue: Queue, name: str) -> tuple[dict[str, Any], str]:
    """Return what the record of the run `name` says and how long it took or has taken, and its `Run.state`."""
    run, state, user = Run(queue, name), LOST, None
    with contextlib.suppress(OSError):
        state = run.state()
        user = user_name(os.fstat(run.fd).st_uid)
    run.close_record()
    record, seconds = run.record, None
    with contextlib.suppress(KeyError, TypeError):  # no record, or an edited one
        seconds = round(max(0.0, record.get('finished', time.time()) - record['started']), 1)
    return {'script': name, 'host': record.get('host'), 'kind': record.get('kind'), 'ids': record.get('ids', []),
            'pid': record.get('pid'), 'user': user, 'seconds': seconds}, state


def screen(status: dict[str, Any]) -> str:
    """Return a `status` for people, in lines."""
    rows = [['', '', '', '']]
    for resource in status['resources']:
        used, total = resource.get('memory_used'), resource.get('memory_total')
        state = shown(resource['state'])
        if state == 'running':
            state = shown(f'{resource["script"]}, {resource["user"]}, {duration(resource["seconds"] or 0)}')
        elif state == 'ended':
            state = shown(f'{resource["script"]}, {resource["user"]}, ended: {resource["reason"]}')
        elif resource['reason']:
            state += f': {resource["reason"]}'
        rows.append([shown(f'{resource["kind"]} {resource["id"]}'), resource.get('model') or '',
                     '' if total is None else f'{used / 1024:.1f} of {memory_text(total)}', state])
    for run in status['elsewhere']:
        rows.append([shown(f'on {run["host"] or "?"}'), '', '',
                     shown(f'{run["script"]}, {run["user"]}') + f', {duration(run["seconds"] or 0)}'])
    widths = [max(map(len, column)) for column in zip(*rows)][:3]
    lines = ['  '.join([cell.ljust(width) for cell, width in zip(row, widths) if width] + [row[3]]) for row in rows[1:]]
    lines.append(' · '.join(f'{name} {number}' for name, number in status['counts'].items())
                 + f' · {"a" if status["poller"] else "no"} poller is alive on {status["host"]}'
                 + (f' · about {duration(status["seconds_left"])} left' if status['seconds_left'] is not None else ''))
    if status['next']:
        lines.append('next: ' + shown(shlex.join(status['next'])))
    for failed in status['failed']:
        lines.append(f'failed: {shown(failed["script"])}: {remark(failed["last_line"], failed["stderr"])}')
    return '\n'.join(lines)


# --- Command --------------------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    """Return the number in `text`; raise argparse.ArgumentTypeError where it is none from 1 to 9999."""
    if not re.fullmatch('0*[1-9][0-9]{0,3}', text):
        raise argparse.ArgumentTypeError(f'not a whole number from 1 to 9999: {text!r}')
    return int(text)


def amount(text: str) -> float:
    """Return the number in `text`; raise argparse.ArgumentTypeError where it is none from 0."""
    if not re.fullmatch(r'[0-9]+(\.[0-9]*)?', text):
        raise argparse.ArgumentTypeError(f'not a number of MiB: {text!r}')
    return float(text)


def words(text: str) -> list[str]:
    """Return the words of the command `text`, split as a shell would; raise argparse.ArgumentTypeError for none."""
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r}: {error}'.lower()) from None
    if not command or not shutil.which(command[0]):
        raise argparse.ArgumentTypeError(f'there is no command {command[0] if command else ""!r}')
    return command


def add_scripts(path: StrPath, commands: Iterable[bytes]) -> list[str]:
    """Put a script into to_run for each line of `commands`, blank ones and comments left out; return their names.

    They are called job-000001.sh and so on, numbered after all such that the queue knows, and run in the folder that
    is the current one now. Raises FastgpuError for a line that cannot be a script, before anything is put there, and
    where only some could be; OSError where there is no queue.
    """
    queue = Queue(path)
    lines = [line.strip() for line in commands]
    lines = [line for line in lines if line and not line.startswith(b'#')]
    for line in lines:
        if b'\0' in line:
            raise FastgpuError(f'no script can hold a NUL byte: {shown(os.fsdecode(line))[:60]}')
    names: list[str] = []
    lock = os.open(queue.to_run, os.O_RDONLY)
    draft = queue.to_run / f'.job-{queue.host}-{os.getpid()}'
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time, so that the lines of one stay together
        taken = [int(match[1]) for folder in queue.folders for name in os.listdir(folder)
                 if (match := re.match(r'job-([0-9]{1,9})[.-]', name))]
        for number, line in enumerate(lines, max(taken, default=0) + 1):
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755), 'wb') as file:
                file.write(os.fsencode(f'#!/bin/sh\ncd {shlex.quote(os.getcwd())} || exit\n') + line + b'\n')
            names.append(safe_rename(draft, queue.to_run, f'job-{number:06}.sh').name)
    except (OSError, KeyboardInterrupt) as error:
        why = explain(error) if isinstance(error, OSError) else 'interrupted'
        done = f'the first {len(names)}, up to {names[-1]}' if names else 'none'
        raise FastgpuError(f'of {count(len(lines), "command")} {done} could be added: {why}') from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
        os.close(lock)
    return names


def show(text: str) -> None:
    """Print `text`, with whatever the encoding of standard output lacks escaped, for whoever may be reading that."""
    encoding = sys.stdout.encoding or 'utf-8'
    write(sys.stdout, text.encode(encoding, 'backslashreplace').decode(encoding) + '\n')


def main(args: list[str] | None = None) -> int:
    """Run the command with `args` (default: those of the process) and return its exit status."""
    parser = argparse.ArgumentParser(
        prog='fastgpu_poll', description='Run the scripts in PATH/to_run on all GPUs, one GPU per script.',
        epilog='example: fastgpu_poll --add <commands.txt && fastgpu_poll')
    parser.add_argument('--path', default='.', help='Path containing `to_run` directory (default: current directory)')
    parser.add_argument('--exit', type=int, default=1, choices=(0, 1), metavar='EXIT',
                        help='Exit when `to_run` is empty: 1, or wait for more: 0 (default: 1)')
    parser.add_argument('--workers', type=positive, metavar='N', help='Use N plain slots instead of GPUs')
    parser.add_argument('--max-used', type=amount, default=1024, metavar='MIB',
                        help='A GPU with more MiB in use is busy (default: 1024)')
    parser.add_argument('--per-gpu', type=positive, default=1, metavar='N',
                        help='Run up to N scripts on a GPU (default: 1)')
    parser.add_argument('--wrapper', type=words, default=[], metavar='CMD',
                        help="Words to put before each script's path, as 'timeout 4h'")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument('--add', action='store_true', help='Make a script of each line of standard input, and exit')
    instead.add_argument('--status', action='store_true', help='Show what runs and what waits, and exit')
    parser.add_argument('--json', action='store_true', help='With --status: as JSON')
    parser.add_argument('--version', action='version', version=f'fastgpu {__version__}')
    options = parser.parse_args(args)
    if options.json and not options.status:
        parser.error('--json is for --status')
    if not options.path:
        parser.error('argument --path: an empty name is no folder')
    try:
        if options.add:
            if sys.stdin and sys.stdin.isatty():
                print('commands, one a line, to the end of the file (Ctrl-D):', file=sys.stderr)
            names = add_scripts(options.path, sys.stdin.buffer if sys.stdin else [])
            if not names:
                print('fastgpu_poll: nothing to add: no commands on standard input', file=sys.stderr)
            for name in names:
                show(shown(name))
            return 0
        if options.status:
            status = look_at_queue(find_pool(options, only_look=True))
            show(json.dumps(status, default=str, indent=1) if options.json else screen(status))
            return 0
        pool = find_pool(options)
        pool.wrapper = options.wrapper
    except (FastgpuError, OSError) as error:
        print(f'fastgpu_poll: {explain(error)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, if our parent did, it would hide how the shims end
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as of a job that a shell has put into the background
            signal.signal(signum, lambda signum, frame: pool.interrupt(signum))
    try:
        return pool.poll_scripts(exit_when_empty=bool(options.exit))
    except OSError as error:
        print(f'fastgpu_poll: {explain(error)}; what runs goes on, and the next fastgpu_poll files it', file=sys.stderr)
        return 1


def find_pool(options: argparse.Namespace, only_look: bool = False) -> ResourcePoolBase:
    """Return the pool that the options ask for; without GPUs, one to `only_look` at what runs."""
    if options.workers:
        return FixedWorkerPool(range(options.workers), options.path, only_look)
    try:
        return ResourcePoolGPU(options.path, options.max_used, options.per_gpu, only_look)
    except FastgpuError:
        if only_look:
            return FixedWorkerPool([], options.path, only_look)
        raise


if __name__ == '__main__':
    sys.exit(main())
