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
- That record, and a lock file per GPU, are locked with flock(2). The script inherits both locks, so they last as
  long as it does, whatever becomes of the poller, and the kernel drops them when it ends, whatever ended it.
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
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Union

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
            sys.stderr.write(lines)
            sys.stderr.flush()


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
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
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


def condition(path: StrPath) -> str:
    """Return what keeps the file `path` from being run: nothing (''), or the reason in a few words.

    `ignored` is what is no script at all: a folder, a FIFO, a name that is gone.
    """
    try:
        status = os.stat(path)
    except OSError:
        return 'a link that leads nowhere' if os.path.islink(path) else 'ignored'
    if not stat.S_ISREG(status.st_mode):
        return 'ignored'
    if not os.access(path, os.X_OK):
        return 'not executable'
    # A time stamp in the future (a clock that was set back, a file server's clock) is not "just now".
    if 0 <= time.time() - status.st_mtime < JUST_WRITTEN:
        return 'just written'
    return ''


def names_in(folder: StrPath) -> list[str]:
    """Return the names in `folder` that are not hidden, in sorted order."""
    return sorted(name for name in os.listdir(folder) if name[0] != '.')


def scripts_in(folder: StrPath) -> dict[str, str]:
    """Return the names of the scripts in `folder`, in sorted order, each with its `condition`."""
    found = {name: condition(os.path.join(folder, name)) for name in names_in(folder)}
    return {name: reason for name, reason in found.items() if reason != 'ignored'}


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


class Listing:
    """The names in a folder in sorted order, from which the first ones are taken.

    To list a long queue takes longer than to start a script of it. So a list serves for six times as long as it took
    to make, and for a second while the folder seems unchanged: its time stamp is too coarse to tell each change.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = folder
        self.names: list[str] = []  # what is left of the list, backwards
        self.again = False  # to be set when a name is taken that should be in the next list: forces one
        self.waiting = False  # to be set when such a name only waits for a moment: the poller does not end then
        self.listed = 0.0  # when the list was made
        self._changed = 0
        self._due = 0.0

    def update(self) -> None:
        """List the folder if that is due. Raises OSError."""
        began = time.monotonic()
        if began < self._due:
            return
        changed = os.stat(self.folder).st_mtime_ns
        if changed == self._changed and not self.again and began < self.listed + LOOK_AROUND:
            return
        self.names = names_in(self.folder)[::-1]
        self.again, self.waiting, self._changed = False, False, changed
        self._due = time.monotonic() + 6 * (time.monotonic() - began)
        self.listed = began


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
    for n in itertools.count():
        target = os.path.join(dest, numbered(name or os.path.basename(file), n))
        try:
            rename_new(file, target)
            return Path(target)
        except FileExistsError:
            continue
    raise AssertionError('unreachable')


# --- Locks: flock(2) on a file, so that a child inherits the lock and the kernel drops it with the last holder ------

def lock_fd(fd: int, path: StrPath, how: int = fcntl.LOCK_EX) -> bool:
    """Lock the open file `fd` if nobody holds it and `path` still leads to it. Raises OSError.

    A file that was deleted meanwhile can be locked by us and its successor by somebody else: that is no lock.
    """
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def open_quietly(path: StrPath, flags: int = os.O_RDONLY) -> int:
    """Open what may be anything, a link or a FIFO, without following it or waiting for it. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def open_lock(path: StrPath) -> int:
    """Open the lock file `path`, made where it is missing, in a folder in which others may plant files.

    Raises OSError, with a reason for people, for anything that is not a lock file: a link, a FIFO.
    """
    while True:
        # Without O_CREAT where it exists: the kernel refuses that for the files of others in a sticky folder
        # (fs.protected_regular in proc(5)).
        try:
            fd = open_quietly(path, os.O_RDWR)
        except FileNotFoundError:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            except FileExistsError:
                continue
        status = os.fstat(fd)
        # A second name could be a file of ours, which we would write to (fs.protected_hardlinks).
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != 0o666:
                os.fchmod(fd, 0o666)  # all users of the host share it, whatever the umask
            return fd
        os.close(fd)
        raise OSError(errno.EINVAL, 'is not a lock file, or has a second name', str(path))


def take_lock(path: StrPath, how: int = fcntl.LOCK_EX) -> int | None:
    """Return a descriptor that holds the lock file `path`, or None where somebody else holds it. Raises OSError.

    None too for one that somebody removed just then: whoever needs it asks again.
    """
    fd = open_lock(path)
    got = False
    try:
        got = lock_fd(fd, path, how)
    finally:
        if not got:
            os.close(fd)
    return fd if got else None


def give_back(fds: Iterable[int]) -> None:
    """Release the locks of these descriptors, which we hold, whoever else inherited them."""
    for fd in fds:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def is_held(path: StrPath) -> bool:
    """Return whether somebody holds the lock file `path`. Who tries to take it just then fails. Raises OSError."""
    try:
        fd = open_quietly(path, os.O_RDWR)  # NFS locks no file exclusively that is only open to be read, flock(2)
    except FileNotFoundError:
        return False
    except OSError:
        fd = open_quietly(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def write_note(fd: int, text: str = '') -> None:
    """Say in a lock file who holds it, for people. All notes are as long: to truncate a file can take 0.3 ms."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, shown(text).encode('utf-8', 'replace')[:255].ljust(255) + b'\n', 0)


def read_note(path: StrPath) -> str:
    """Return what the holder of the lock file `path` wrote there, for people only: anybody can write to it."""
    with contextlib.suppress(OSError), open(open_quietly(path), encoding='utf-8', errors='replace') as file:
        return shown(file.read(256).strip())
    return ''


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
    try:
        with open(f'/proc/{pid}/cmdline', 'rb') as file:
            return os.fsencode(exitcode) in file.read().split(b'\0')
    except OSError:
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
    try:
        with open(script, 'rb') as file:
            words = file.readline(300).rstrip(b'\n')
    except OSError:
        return ''
    interpreter = words[2:].strip(b' \t').split(b' ')[0]
    if not words.startswith(b'#!') or os.path.exists(interpreter):
        return ''
    return f'its interpreter {os.fsdecode(interpreter)} does not exist'


class Queue:
    """The folders of a queue, as this host sees them, and where in them the files of a run are."""

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

    def out_file(self, name: str, kind: str) -> str:
        """Return the file of that `kind` in out/ of the run `name`."""
        return f'{self.out}/{name}.{kind}'

    def announce(self) -> int | None:
        """Let `status` know that a poller is alive, until the descriptor is closed that this returns, if it can."""
        with contextlib.suppress(OSError):
            for _ in range(10):  # `status` takes the lock for a moment, to see
                fd = take_lock(self.alive, fcntl.LOCK_SH)
                if fd is not None:
                    return fd
                time.sleep(0.01)
        return None

    def claim(self, script: str, kind: str, ids: Sequence[Any]) -> Run | None:
        """Reserve a name for a run of `script` and move it to running/ under that name; None if it is gone.

        Raises FastgpuError where that can never be done, OSError where it cannot now.
        """
        for n in itertools.count():
            name = numbered(script, n)
            too_long = len(os.fsencode(name + '.exitcode')) - 255  # NAME_MAX of all file systems of Linux
            if too_long > 0:
                raise FastgpuError(f'its name is too long, by {too_long} bytes')
            if any(map(os.path.lexists, [*(f'{folder}/{name}' for folder in (self.running, self.complete, self.fail)),
                                         *(self.out_file(name, kind) for kind in ('stdout', 'stderr', 'exitcode'))])):
                continue
            path = self.out_file(name, 'json')
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise FastgpuError('its name is too long') from None
                raise
            run = Run(self, name, ids, fd, {'script': script, 'host': self.host, 'kind': kind, 'ids': ids,
                                            'started': round(time.time(), 3)})
            try:
                # From the rename on, a name in running/ whose record is not locked has no owner.
                if not lock_fd(fd, path):
                    run.close_record()  # another poller just took it for the record of a crashed one
                    continue
                run.save()
                os.rename(f'{self.to_run}/{script}', run.path)
            except BaseException as error:
                gone = isinstance(error, FileNotFoundError)
                # On NFS the reply to a rename can be lost, and its repetition finds nothing to rename.
                if not (gone and os.path.lexists(run.path)):
                    run.unclaim()
                    if gone and not os.path.lexists(f'{self.to_run}/{script}'):
                        return None
                    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EBUSY, errno.EXDEV):
                        raise FastgpuError(f'it cannot be moved: {error.strerror}') from None
                    raise
            return run
        raise AssertionError('unreachable')

    def remove_strays(self) -> None:
        """Remove the records of runs that never were: their poller died between the record and the rename."""
        names = set(os.listdir(self.out))
        for file in sorted(names):
            name, suffix = os.path.splitext(file)
            if suffix != '.json' or name + '.stdout' in names:
                continue
            run = Run(self, name)
            try:
                run.open_record()
            except OSError:
                continue  # none of ours, or gone
            with contextlib.suppress(OSError):
                ours = run.record or os.fstat(run.fd).st_size == 0  # others may keep their JSON files there
                if (ours and not run.record.keys() & {'pid', 'finished'} and run.host() == self.host
                        and lock_fd(run.fd, run.out('json'))
                        and not run.was_started() and not os.path.lexists(run.path)):
                    os.unlink(run.out('json'))
            run.close_record()


class Run:
    """A script in running/ on this host: one that this poller started, or one that it found there."""

    def __init__(self, queue: Queue, name: str, ids: Sequence[Any] = (), fd: int = -1,
                 record: dict[str, Any] | None = None) -> None:
        self.queue, self.name, self.record = queue, name, record or {}
        self.path = f'{queue.running}/{name}'
        self.ids, self.fd = ids, fd  # what we still hold for it: its resources, and its record
        self.process: subprocess.Popen[bytes] | None = None  # its shim, if we are the one who waits for it
        self.is_new = False  # whether we started it, and did not log that yet
        self.pidfd: int | None = None
        self.status: int | None = None  # how it ended as its shim told us, where that could not write it
        self.kill_at: float | None = None  # when it gets KILL, set when it got TERM
        self.finished = 0.0  # when it ended, once it is settled

    # Its files.

    @property
    def script(self) -> str:
        """The name it had in to_run, and will have if it goes back there."""
        return str(self.record.get('script', self.name))

    def out(self, kind: str) -> str:
        """Return its file of that `kind` in out/."""
        return self.queue.out_file(self.name, kind)

    def open_record(self) -> None:
        """Open the record of a run that is not ours, and read it. Raises OSError."""
        self.fd = open_quietly(self.out('json'), os.O_RDWR)
        try:
            self.record = read_record(self.fd)
        except OSError:  # a FIFO
            self.close_record()
            raise

    def close_record(self) -> None:
        """Close it, and with that give the lock on it back, if that is ours alone."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def save(self) -> None:
        """Write what we know of the run to its record. Raises OSError."""
        text = json.dumps(self.record, default=str) + '\n'
        if self.fd >= 0:
            write_all(self.fd, text)
        else:
            with open(self.out('json'), 'r+b', 0) as file:
                write_all(file.fileno(), text)

    def host(self) -> str:
        """Return the host of a run whose record is open, ours if that stays empty, '' while it may be on its way here.

        A record stays empty where its poller, or the power, died between two system calls. After a minute (file
        servers and caches take at most half of one) it is taken for such a one, and for ours.
        """
        old = time.time() - os.fstat(self.fd).st_mtime > 60
        return str(self.record.get('host') or (self.queue.host if old else ''))

    def was_started(self) -> bool:
        """Return whether it wrote anything, by which it is known even without a pid in its record."""
        sizes = [os.stat(self.out(kind)).st_size for kind in ('stdout', 'stderr') if os.path.exists(self.out(kind))]
        return any(sizes) or os.path.lexists(self.out('exitcode'))

    def exit_code(self) -> tuple[int | None, float]:
        """Return its exit status and the time it ended, or None and now.

        An empty file is none: the shim makes the file and then writes to it.
        """
        try:
            with open(self.out('exitcode'), 'rb') as file:
                finished = os.fstat(file.fileno()).st_mtime
                text = file.read(8)
        except FileNotFoundError:
            return None, time.time()
        return int(text) if re.fullmatch(rb'[0-9]{1,3}', text) else None, finished

    def taken_out(self) -> bool:
        """Return whether it is certainly no longer in running/: not if the folder is gone too, or cannot be read."""
        try:
            os.lstat(self.path)
        except OSError as error:
            return isinstance(error, FileNotFoundError) and os.path.isdir(self.queue.running)
        return False

    # Its processes.

    def launch(self, command: Sequence[str], locks: Iterable[int], environment: dict[str, str]) -> None:
        """Start `command` under a shim that inherits our descriptors `locks`.

        Where that fails, raises OSError with the script back in to_run and no traces left.
        """
        files: list[int] = []
        try:
            for kind in ('stdout', 'stderr'):
                files.append(os.open(self.out(kind), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666))
            self.process = subprocess.Popen(
                ['/bin/sh', '-c', SHIM, 'fastgpu', self.out('exitcode'), *command], stdin=subprocess.DEVNULL,
                stdout=files[0], stderr=files[1], start_new_session=True, pass_fds=(self.fd, *locks), env=environment)
        except OSError:
            self.unclaim()
            raise
        except BaseException:
            self.close_record()  # a KeyboardInterrupt: whether something was started is for the next settle to say
            raise
        finally:
            for fd in files:
                os.close(fd)
        self.is_new = True
        self.record['pid'] = self.process.pid
        with contextlib.suppress(OSError):  # a full disk: while we live, we know it
            self.save()

    def unclaim(self) -> None:
        """Undo the claim of a run that was never started, so that nothing of it is left. Raises OSError."""
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

    def shim(self) -> int | None:
        """Return the pid of its shim, which is the id of its session, or None if it is not alive."""
        if self.process:
            return self.process.pid if self.process.returncode is None else None
        pid = self.record.get('pid')
        return pid if isinstance(pid, int) and runs_shim(pid, self.out('exitcode')) else None

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
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ChildProcessError):  # WNOWAIT: without reaping it, so that its pid stays its own
                ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended or time.monotonic() >= self.kill_at:
            deadline = time.monotonic() + 0.5  # what it held is not for the next script before all of it is gone
            while self.signal(signal.SIGKILL) and time.monotonic() < deadline:
                time.sleep(0.001)

    # Its end.

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
        if self.status is None and 'pid' not in record and not self.was_started():  # its poller died before that
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
            return next((folder.name for folder in (queue.fail, queue.complete)
                         if os.path.lexists(folder / self.name)), ''), ''
        if code == 0:
            safe_rename(self.path, queue.complete)
            return 'complete', f'complete {name} {how}'
        if record.get('stopped') or (code is None and not unknown):
            path = safe_rename(self.path, queue.to_run, self.script)
            return 'to_run', f'requeue {name}' + f' as {shown(path.name)}' * (path.name != self.name) + f' {how}'
        path = safe_rename(self.path, queue.fail)
        reason = (missing_interpreter(path) if code == 127 else '') or last_line(self.out('stderr'))
        return 'fail', f'fail {name} {how}: {remark(reason, self.out("stderr"))}'


# --- Pools: who may run what, and when ------------------------------------------------------------------------------

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
        self.path, self.host = self.queue.path, self.queue.host
        self.wrapper: list[str] = []  # words to put in front of each script's path
        self.completed: list[str] = []  # the runs that were filed since `poll_scripts` was called last, by name
        self.failed: list[str] = []
        self.cancelled: list[str] = []
        self.busy_seconds = 0.0  # of all resources together, since then
        self._seconds = 0.0  # that these runs took
        self._locks: dict[Hashable, list[int]] = {}  # the resources that we hold, and the descriptors that hold them
        self._ask_at: dict[Hashable, float] = {}  # when to ask again whether a `distinct` resource is available
        self._runs: dict[str, Run] = {}
        self._elsewhere: dict[str, str] = {}  # what there is to say of those on other hosts, by their paths
        self._cuts: dict[str, int] = {}  # how often a script was cut off under our eyes
        self._unfit: dict[Hashable, str] = {}  # why a script in to_run, as long as it is the same file, can never start
        self._reasons: dict[Hashable, str] = {}  # why a resource is not free
        self._said: dict[Hashable, str] = {}  # what was last logged about what, see `_say`
        self._poller = select.poll()
        self._many_hosts = os.environ.get('SLURM_STEP_NUM_NODES', '1') != '1'  # srun(1); or we see another one's run
        self._began = time.time()
        self._look_at = self._start_at = 0.0  # when to look around, and to start scripts, again
        self._scripts = Listing(self.queue.to_run)
        self._collected_at = 0.0
        self._signals: list[int] = []
        self._stop_at: float | None = None

    # Resources: what the original's users know, and override.

    def all_ids(self) -> Iterable[Any]:
        """Return the resources, in order of preference."""
        raise NotImplementedError

    def is_available(self, ident: Any) -> bool:
        """Return whether `ident` can take a script, as far as this pool can tell without its lock.

        A subclass adds its own test to `super().is_available(ident)`. Before a script starts it is asked with the lock
        of `ident` already taken, so what it finds cannot be changed by another poller.
        """
        return ident not in self._locks

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return the variables that a script on `ids` (mostly one) gets in addition to those of the poller."""
        return {'FASTGPU_ID': ','.join(map(str, ids))}

    def demand(self, script: StrPath) -> int:
        """Return how many resources `script` needs at once."""
        return 1

    def distinct(self, ident: Any) -> Any:
        """Return what a script that needs several resources cannot have two of: `ident` itself."""
        return ident

    def lock_path(self, ident: Any) -> Path:
        """Return the lock file of `ident`: here in the queue, and one per host, since flock is."""
        return self.path / f'.{self.host}-{ident}.lock'.replace('/', '_')

    def lock(self, ident: Any) -> bool:
        """Take the lock of `ident`; return whether we got it. It is ours until `unlock`, or until we end.

        It does not say why we did not; only the log of `poll_scripts` does.
        """
        return ident not in self._locks and self._try(ident, keep=True)

    def unlock(self, *ids: Any) -> None:
        """Give the locks of `ids` back, also if a daemon that a script left behind still holds copies of them."""
        for ident in ids:
            give_back(self._locks.pop(ident, []))

    def _drop(self, *ids: Any) -> None:
        """Close our descriptors of these locks: whoever inherited them, if anybody did, still holds them."""
        for ident in ids:
            for fd in self._locks.pop(ident, []):
                os.close(fd)

    def find_next(self) -> Any:
        """Return the first resource that is available and locked by nobody, or None."""
        return next((i for i in self.all_ids() if i not in self._locks and self._try(i, self.is_available)), None)

    def lock_next(self) -> Any:
        """Lock the first resource that is available; return it, or None where there is none."""
        self._ask_at.clear()
        return next(iter(self._lock_some(1)), None)

    def _lock_some(self, number: int) -> list[Any]:
        """Lock that many of the resources that are worth asking for; all of them or none."""
        ids: list[Any] = []
        left = self._worth_asking()
        try:
            for ident in list(left):
                # Stop as soon as it cannot be done: two pollers that each hold a part would wait for each other.
                if len(set(map(self.distinct, left))) < number:
                    break
                if self.distinct(ident) in map(self.distinct, ids):
                    continue
                if self._try(ident, self.is_available, keep=True):
                    ids.append(ident)
                else:
                    left.remove(ident)
                if len(ids) == number:
                    return ids
        finally:
            if len(ids) < number:
                self.unlock(*ids)
                for ident in ids:  # for a time of our own, so that those who met do not meet again
                    self._ask_at[self.distinct(ident)] = time.monotonic() + LOOK_AROUND * (0.5 + os.urandom(1)[0] / 256)
        return []

    def _worth_asking(self) -> list[Any]:
        """Return the resources that are not ours, and were not found to be taken less than a second ago."""
        now = time.monotonic()
        return [ident for ident in self.all_ids() if ident not in self._locks
                and now >= self._ask_at.get(self.distinct(ident), 0)]

    def _take(self, ident: Any) -> list[int] | None:
        """Return descriptors that hold `ident`, or None where somebody else does. Raises OSError."""
        fd = take_lock(self.lock_path(ident))
        if fd is None:
            self._blame(ident, self.lock_path(ident))
            return None
        write_note(fd)  # what it says of whoever had it before is no longer so
        return [fd]

    def _blame(self, ident: Any, path: Path) -> None:
        """Note who holds the lock file `path`. One who wrote nothing there is only asking, as we are."""
        note = read_note(path)
        if note or ident not in self._reasons:
            self._reasons[ident] = f'busy: {note or "locked, " + shown(path)}'

    def _try(self, ident: Any, test: Any = None, keep: bool = False) -> bool:
        """Return whether `ident` could be locked and then passed `test`; `keep` the lock if so."""
        try:
            fds = self._take(ident)
        except OSError as error:
            self._reasons[ident] = f'unusable: {explain(error)}'
            return False
        if fds is None:
            return False
        self._reasons.pop(ident, None)
        good = False
        try:
            good = test is None or bool(test(ident))
        finally:
            if good and keep:
                self._locks[ident] = fds
            else:
                give_back(fds)
        if not good:
            self._ask_at[self.distinct(ident)] = time.monotonic() + LOOK_AROUND
        return good

    def look(self, ident: Any) -> dict[str, Any]:
        """Return the `state` of a resource, free, busy or unusable, and the `reason` where it is not free."""
        path = self.lock_path(ident)
        self._reasons.pop(ident, None)
        try:
            if is_held(path):
                since = f' for {duration(time.time() - os.stat(path).st_mtime)}'
                return {'state': 'busy', 'reason': (read_note(path) or 'locked') + since}
        except OSError as error:
            return {'state': 'unusable', 'reason': explain(error)}
        if self.is_available(ident):
            return {'state': 'free', 'reason': None}
        state, _, reason = str(self._reasons.get(ident) or 'busy').partition(': ')
        return {'state': state, 'reason': reason}

    # The life of a script, in order: claim, launch, settle.

    def run(self, script: StrPath, *ids: Any, refusal: str = '') -> bool:
        """Move `script` from to_run to running and start it on `ids` (mostly one), which are locked if they were not.

        Returns at once: whether it started, or was no longer there. `poll_scripts` files it when it has ended.
        Raises FastgpuError where the script can never run, OSError where the machine cannot start it now; it is in
        to_run then. With a `refusal` a shell that prints that and fails runs in its place.
        """
        taken = [ident for ident in ids for run in self._runs.values() if ident in run.ids]
        if taken:
            raise FastgpuError(f'{self._where(taken)} is in use')
        run = None
        try:
            for ident in ids:
                if ident not in self._locks and not self.lock(ident):
                    raise FastgpuError(f'{self.kind} {ident} {self._reasons.get(ident, "busy")}')
            environment = {'PYTHONUNBUFFERED': '1', **os.environ, **self.environment(*ids)}
            run = self.queue.claim(os.path.basename(script), self.kind, ids)
            if not run:
                return False
            refuse = ['/bin/sh', '-c', 'echo "fastgpu: $1" >&2; exit 1', 'fastgpu', refusal]
            run.launch(refuse if refusal else [*self.wrapper, run.path],
                       [fd for ident in ids for fd in self._locks[ident]], environment)
        finally:
            if not (run and run.process):
                self._drop(*ids)
        self._runs[run.name] = run
        for ident in ids:
            write_note(self._locks[ident][0],
                       f'runs {run.name} of user {os.getuid()} (pid {run.record["pid"]}, {self.path})')
        with contextlib.suppress(AttributeError, OSError):  # before Linux 5.3, or built for that: the interval does
            run.pidfd = os.pidfd_open(run.record['pid'])
            self._poller.register(run.pidfd, select.POLLIN)
        return True

    def _settle(self, run: Run) -> bool:
        """File a run that has ended; return whether that is done. Where it is not, it is to be called again."""
        try:
            code, finished = run.exit_code()
            # Slurm, or a box that shuts down, sends TERM to all processes at once, to some of them a moment earlier
            # than to us: what it ended goes back to to_run.
            if (code or run.status) and not run.record.keys() & {'cancelled', 'finished'}:
                age = time.time() - finished
                if self._stopping() and age < 1:
                    run.record['stopped'] = True
                elif code == 128 + signal.SIGTERM and not self._signals and 0 <= age < 0.5:
                    return False  # too early to tell
            folder, text = run.settle(code, finished)
        except OSError as error:
            self._say(run.path, f'cannot file {shown(run.name)} now: {explain(error)}; trying again')
            with contextlib.suppress(OSError):
                setup_dirs(self.path)  # one of them may be gone
            return False
        run.close_record()
        if text:
            log(f'{self._where(run.record.get("ids", "?"))}: {text}', alarm=folder == 'fail')
        ended = {'complete': self.completed, 'fail': self.failed, 'cancelled': self.cancelled}.get(folder)
        if ended is not None:
            ended.append(run.name)
            self._seconds += run.seconds()
        self.busy_seconds += run.seconds(self._began) * len(run.record.get('ids', [0]))
        return True

    def _where(self, ids: Iterable[Any]) -> str:
        """Return where a run runs, for the log: `gpu 0`, and of which host where several take part."""
        return shown(f'{self.host} ' * self._many_hosts + f'{self.kind} {",".join(map(str, ids)) or "-"}')

    # Polling.

    def poll_scripts(self, poll_interval: float = 0.1, exit_when_empty: bool = True) -> int:
        """Run the scripts of to_run, each on a resource of its own, and file them when they have ended.

        Looks every `poll_interval` seconds, and at the moment a script ends. With `exit_when_empty` it returns when
        nothing is left to run and nothing of this queue runs on this host; else it goes on until it is stopped by
        `interrupt`. What runs at an exception goes on, and is filed by the next call or the next poller.

        Returns 0 if all ended well, 1 if a script failed or was left in to_run, 128+N if it was stopped by signal N.
        Raises OSError where the queue cannot be read.
        """
        self._began, self.busy_seconds, self._seconds = time.time(), 0.0, 0.0
        for ended in (self.completed, self.failed, self.cancelled):
            ended.clear()
        self.queue.remove_strays()
        alive = self.queue.announce()
        try:
            self._poll(poll_interval, exit_when_empty)
        finally:
            log.bottom('')
            if alive is not None:
                os.close(alive)
        return self._sum_up(time.time() - self._began)

    def _poll(self, poll_interval: float, exit_when_empty: bool) -> None:
        """Do what `poll_scripts` says."""
        while True:
            released = self._release()
            looked = time.monotonic() >= self._look_at
            if looked:
                self._collect(others=True)
                self._look_at = time.monotonic() + LOOK_AROUND
            idle = looked and not self._runs
            if idle:
                self._scripts = Listing(self.queue.to_run)  # a script that came just now is not to be overlooked
            # The next scripts start before those that have ended are filed, so that no resource waits for that.
            left = self._start(hurry=released)
            self._collect()
            if released and time.monotonic() > self._scripts.listed + LOOK_AROUND / 3:
                self._scripts.update()  # nothing waits for that now
            if not left and not self._runs:
                for path, text in self._elsewhere.items():
                    self._say(path, text)
            if self._signals:
                if self._stop():
                    return
            elif not left and exit_when_empty:
                if not self._runs:
                    if idle:
                        return
                    self._look_at = 0.0  # leave only after a look around, which may requeue something
                    continue
                if looked and not any(run.process for run in self._runs.values()):
                    for name in self._runs:
                        self._say(f'/wait/{name}', f'waiting for {shown(name)}, which runs without this poller')
            log.bottom(self._progress())
            self._poller.poll(poll_interval * 1000)

    def interrupt(self, signum: int) -> None:
        """Stop `poll_scripts`; made to be called by a signal handler.

        SIGINT once: start nothing more, wait for what runs. A second time, or any other signal: TERM to the session of
        each script, KILL after 10 s; what does not end well goes back to to_run.
        """
        self._signals.append(signum)

    def _start(self, hurry: bool) -> bool:
        """Start what can be started; return whether something is left that waits for a resource or for a moment.

        In a `hurry`, because a resource just became free, to_run is listed only if nothing is left of the last list.
        """
        while self._start_at <= time.monotonic() < self._look_at and not self._signals:
            name = self._next_script(hurry)
            if name is None:
                return self._scripts.waiting
            try:
                if not self._start_one(name):
                    return True
                self._scripts.names.pop()
                self._said.pop(name, None)
            except FastgpuError as error:
                self._unfit[name, file_mark(self.queue.to_run / name)] = str(error)
            except OSError as error:
                self._say('/start', f'cannot start {shown(name)} now: {explain(error)}; trying again')
                self._start_at = time.monotonic() + LOOK_AROUND
        return not self._signals

    def _next_script(self, hurry: bool) -> str | None:
        """Return the name of the first script in to_run that can start, None where there is none."""
        if not (hurry and self._scripts.names):
            self._scripts.update()
        while self._scripts.names:
            name = self._scripts.names[-1]
            reason = condition(f'{self.queue.to_run}/{name}') or self._why_unfit(name)
            # A person who moves a running script back to to_run ends that run, and it starts anew when that has ended.
            ending = any(name in (run.name, run.record.get('script')) and (run.kill_at or run.taken_out())
                         for run in self._runs.values())
            if not reason and not ending:
                return name
            self._scripts.names.pop()
            self._scripts.again |= reason != 'ignored'
            if not reason or reason == 'just written':
                self._scripts.waiting = True
            elif reason != 'ignored':
                path = shown(near(self.queue.to_run / name))
                self._say(name, f'{path} waits for its chmod +x' if reason == 'not executable' else
                          f'{path} cannot run: {reason}')
        return None

    def _start_one(self, name: str) -> bool:
        """Start the script `name` of to_run if what it needs is free, else say why not; return whether it was."""
        if not self._worth_asking():
            return False
        number = self.demand(self.queue.to_run / name)
        most = len(set(map(self.distinct, self.all_ids())))
        if number > most:
            reason = f'{shown(name)} asks for {number} {self.kind}s, and there {"are" if most != 1 else "is"} {most}'
            self._say(name, reason)
            self.run(name, refusal=reason)
            return True
        ids = self._lock_some(number)
        if self._signals:  # a driver can take seconds for its answers
            self.unlock(*ids)
            return False
        for ident in self.all_ids():
            reason = '' if ident in self._locks else self._reasons.get(ident, '')
            if not reason:
                self._said.pop((self.kind, ident), None)
            elif not ids:
                self._say((self.kind, ident), f'{self._where([ident])} {reason}')
        if ids:
            self.run(name, *ids)
        elif number > 1:
            self._say(name, f'{shown(name)} waits for {number} {self.kind}s at once, and all behind it wait too')
        return bool(ids)

    def _why_unfit(self, name: str) -> str:
        """Return why the script `name` of to_run can never start, '' where nothing is known or the file is another."""
        return self._unfit.get((name, file_mark(self.queue.to_run / name)), '')

    def _release(self) -> bool:
        """Give back what those scripts of ours held that have ended; return whether that was anything."""
        released = False
        for run in self._runs.values():
            if not run.process or run.process.returncode is not None:
                continue
            run.kill()
            code = run.process.poll()
            if code is None:
                continue
            if run.pidfd is not None:
                self._poller.unregister(run.pidfd)
                os.close(run.pidfd)
            if code < 0:
                self._drop(*run.ids)  # its script may have survived its shim: when the lock ends is for the kernel
            self.unlock(*run.ids)
            run.ids = ()  # from here on they may be another run's
            self._ask_at.clear()  # perhaps that is all that the next script needs
            released = True
        return released

    def _collect(self, others: bool = False) -> None:
        """File the runs that have ended, and end those that a person took out of running/; `others`: not only ours."""
        self._collected_at = time.monotonic()
        if others:
            self._elsewhere.clear()
            for name in names_in(self.queue.running):
                self._runs.setdefault(name, Run(self.queue, name))
        for run in list(self._runs.values()):
            if run.is_new:
                run.is_new = False
                log(f'{self._where(run.record["ids"])}: start {shown(run.name)}')
            if not run.process and not others:
                continue
            try:
                done = self._collect_ours(run, run.process) if run.process else self._collect_other(run)
            except OSError as error:
                self._say(run.path, f'cannot tell how {shown(run.name)} is: {explain(error)}')
                done = not run.process
            if done:
                del self._runs[run.name]
            elif run.kill_at is None and run.taken_out() and run.shim() and run.exit_code()[0] is None:
                log(f'{self._where(run.record.get("ids", "?"))}: cancel {shown(run.name)}, taken out of running')
                run.terminate('cancelled')

    def _keep_up(self) -> None:
        """File the runs that have ended, if it took long since we looked: a driver can take seconds for an answer."""
        if time.monotonic() > self._collected_at + 0.1:
            self._release()
            self._collect()

    def _collect_ours(self, run: Run, process: subprocess.Popen[bytes]) -> bool:
        """Settle a run that we started, if its shim has ended; return whether it is filed."""
        code = process.returncode
        if code is None:
            return False
        if code < 0:
            # Killed before it could write: it is a run that we found. A script that kills its own group each time
            # would go round for ever: the second time counts as its end.
            run.close_record()
            script = run.record['script']
            self._cuts[script] = self._cuts.get(script, 0) + (run.kill_at is None)
            run.status = 128 - code if self._cuts[script] > 1 else None
            run.process = None
            return self._collect_other(run)
        if code == NOT_STARTED and last_line(run.out('stderr')) == NO_PROCESS:
            self._say('/start', f'cannot start {shown(run.name)} now: no process to be had for it; trying again')
            self._start_at = time.monotonic() + LOOK_AROUND
            run.unclaim()
            return True
        run.status = code
        self._cuts.pop(run.record['script'], None)
        return self._settle(run)

    def _collect_other(self, run: Run) -> bool:
        """Settle a run that we found, if it has ended; return whether there is nothing more to do for us."""
        requeue = shown(f'mv {shlex.quote(run.path)} {shlex.quote(str(self.queue.to_run))}/')
        run.kill()
        try:
            run.open_record()
        except FileNotFoundError:
            if os.path.lexists(run.path):
                self._say(run.path, f'{shown(run.path)} has no record in out; if nothing runs it: {requeue}')
            return True
        try:
            code, finished = run.exit_code()
            host = run.host()
            if host != self.host:
                if host:
                    self._many_hosts = True
                    self._elsewhere[run.path] = (
                        f'{shown(run.name)} runs on {shown(host)}; if that host is gone: {requeue}' if code is None else
                        f'{shown(run.name)} ended on {shown(host)} ({describe(code)}): start fastgpu_poll there')
                return True
            overdue = code is not None and time.time() - finished > OVERDUE
            # A record that somebody edited can be a new file, which nobody locks: look for the shim too.
            if not overdue and not (lock_fd(run.fd, run.out('json')) and (code is not None or not run.shim())):
                return False
            filed = not os.path.lexists(run.path) and not run.record.get('cancelled')  # by another poller
            return filed or self._settle(run)
        finally:
            run.close_record()

    def _stopping(self) -> bool:
        """Return whether scripts are to be stopped, not only no more to be started."""
        return bool(self._signals) and self._signals != [signal.SIGINT]

    def _stop(self) -> bool:
        """Do what the signals so far ask for; return whether it is done."""
        # Ours that run; one that has ended and cannot be filed now is for the next poller.
        alive = [run for run in self._runs.values() if run.process and run.process.returncode is None]
        if not self._stopping():
            if alive and '/stop' not in self._said:
                self._say('/stop', f'interrupted: waiting for {count(len(alive), "script")}; Ctrl-C again stops them')
            return not alive
        if self._stop_at is None:
            self._stop_at = time.monotonic()
            self._look_at = 0.0  # at the scripts of others, which may have got TERM too
            if alive:
                log(f'stopping {count(len(alive), "script")}: TERM now, KILL in {GRACE:.0f} s')
        for run in alive:
            if run.kill_at is None and run.exit_code()[0] is None:
                run.terminate('stopped')
        killed = [run for run in self._runs.values() if not run.process and run.kill_at is not None]
        looked = self._look_at > 0
        if killed:
            self._look_at = 0.0
        return (looked and not (alive or killed)) or time.monotonic() > self._stop_at + 2 * GRACE

    def _say(self, about: Hashable, text: str) -> None:
        """Log `text` unless it is what was last said about this, but for amounts of memory, which always change.

        `about` is a resource, a script in to_run by its name, a run by its path, or another word with a slash in it.
        """
        gist = re.sub(r'[0-9.]+ [MG]iB', '', text)
        if self._said.get(about) != gist:
            self._said[about] = gist
            log(text)

    def _sum_up(self, seconds: float) -> int:
        """Log what was done and what was left; return the exit status."""
        left = scripts_in(self.queue.to_run)
        if not self._signals:
            for name, reason in left.items():
                log(f'left in to_run: {shown(name)} ({reason or self._why_unfit(name) or "new"})')
        done = len(self.completed) + len(self.failed) + len(self.cancelled)
        if done or left:
            log(f'{shown(self.host)}: ' * self._many_hosts + f'{count(done, "script")} in {duration(seconds)}: '
                f'{len(self.completed)} complete, {len(self.failed)} fail'
                + f', {len(self.cancelled)} cancelled' * bool(self.cancelled)
                + f', {len(left)} left in to_run' * bool(left))
        else:
            log(f'nothing to run in {shown(self.queue.to_run)}')
        if done:
            share = min(1.0, self.busy_seconds / max(0.001, seconds) / len(list(self.all_ids())))
            log(f'{duration(self.busy_seconds)} of {self.kind} time used, {self.kind}s busy {share:.0%} of the time')
        if self.failed:
            log('failed: ' + shown(shlex.join(self.failed[:10])) + f' and {len(self.failed) - 10} more'
                * (len(self.failed) > 10), alarm=True)
        if self._signals:
            return 128 + self._signals[-1]
        return 1 if self.failed or left else 0

    def _progress(self) -> str:
        """Return in one line how far this poller is."""
        done, running = len(self.completed) + len(self.failed) + len(self.cancelled), len(self._runs)
        waiting = 0 if self._signals else len(self._scripts.names)
        if not (running or waiting):
            return f'{done} done ({len(self.failed)} failed), waiting for scripts'
        text = f'{done}/{done + running + waiting} done ({len(self.failed)} failed), {running} running'
        if done and running:
            now = time.time()
            seconds = self._seconds + sum(now - run.record.get('started', now) for run in self._runs.values())
            text += f', about {duration(time_left(seconds / (done + running), waiting, running))} left'
        return text


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
    """The driver, by way of nvidia-ml-py. Raises ImportError without it, DriverError without a driver."""

    def __init__(self) -> None:
        import pynvml  # here, because a pool of another kind needs none
        if not hasattr(pynvml, 'nvmlMemory_v2'):
            raise ImportError('the module pynvml is too old')
        self._nvml: Any = pynvml
        self._up = False
        self._blind = False

    def _ask(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an NVML function; raise DriverError if the driver is gone, NVMLError for anything else.

        A driver that comes back has to be initialised again, and its old handles mean nothing then: so there are
        none, a GPU is looked up by its UUID for each question.
        """
        nvml = self._nvml
        try:
            if not self._up:
                nvml.nvmlInit()
                self._up = True
            return function(*args, **kwargs)
        except nvml.NVMLError as error:
            if not self._up or error.value in (
                    nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                    nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH):
                if self._up:
                    with contextlib.suppress(nvml.NVMLError):
                        nvml.nvmlShutdown()
                self._up = False
                raise DriverError(str(error)) from None
            raise

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, in NVML's order, those in MIG mode as their instances. Raises DriverError."""
        nvml, ask = self._nvml, self._ask
        found = []
        try:
            number = ask(nvml.nvmlDeviceGetCount)
        except nvml.NVMLError as error:
            raise DriverError(str(error)) from None
        for index in range(number):
            try:
                handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
                gpu = Gpu(index, *self._name(handle))
                instances = self._instances(handle)
                if instances == []:
                    gpu.error = 'is in MIG mode and has no instances (see nvidia-smi mig)'
                found += [Gpu(index, *self._name(instance), gpu.uuid) for instance in instances or ()] or [gpu]
            except nvml.NVMLError as error:
                found.append(Gpu(index, error=str(error)))
        return found

    def _name(self, handle: Any) -> tuple[str, str]:
        """Return the UUID and the model, which is for people only, of a GPU or an instance. Raises NVMLError."""
        uuid = str(self._ask(self._nvml.nvmlDeviceGetUUID, handle))
        with contextlib.suppress(self._nvml.NVMLError):
            return uuid, str(self._ask(self._nvml.nvmlDeviceGetName, handle))
        return uuid, ''

    def _instances(self, handle: Any) -> list[Any] | None:
        """Return the handles of the MIG instances of a GPU, None if it is not in MIG mode. Raises NVMLError."""
        nvml = self._nvml
        try:
            current, _ = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # most cards; drivers before 450
            return None
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
        instances = []
        for index in range(self._ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle)):  # a capacity, with gaps
            with contextlib.suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                instances.append(self._ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        return instances

    def memory(self, gpu: Gpu) -> tuple[float, float]:
        """Return the memory of a GPU in use, and all it has, in MiB. Raises GpuError."""
        nvml = self._nvml
        try:
            handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
            try:
                memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle, version=nvml.nvmlMemory_v2)
            except nvml.NVMLError_FunctionNotFound:  # drivers before 510, where what the driver reserves counts as used
                memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        except nvml.NVMLError as error:
            raise GpuError(str(error)) from None
        return memory.used / 2**20, memory.total / 2**20

    def pids(self, gpu: Gpu) -> list[int]:
        """Return the pids of the compute processes on a GPU, as its driver counts them. Raises GpuError."""
        nvml = self._nvml
        for _ in range(5):  # the list can grow between the two calls that nvidia-ml-py makes
            try:
                handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
                try:  # not the function without a version: it refuses to work on drivers before 510
                    processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
                except nvml.NVMLError_FunctionNotFound:
                    processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
                return [process.pid for process in processes]
            except nvml.NVMLError_InsufficientSize:
                continue
            except nvml.NVMLError_NotSupported:
                if not self._blind:
                    self._blind = True
                    log(f'gpu {gpu.ident} does not tell its processes: its memory alone says whether it is free')
                return []
            except nvml.NVMLError as error:
                raise GpuError(str(error)) from None
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
    except DriverError as error:
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
    try:
        with open(f'/proc/{pid}/comm', errors='replace') as file:
            return shown(f'pid {pid} ({file.read().strip()}, user {os.stat(f"/proc/{pid}").st_uid})')
    except OSError:
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
        if not os.path.isabs(self._lock_file('')):
            raise FastgpuError('FASTGPU_LOCK_DIR has to be the same for all: give it an absolute path')
        super().__init__(path, only_look)  # not before it is clear that there are GPUs: it makes folders
        self.max_used, self.per_gpu = max_used, per_gpu
        # The n-th place on GPU 3 is 3 itself, then 3.1, 3.2: first one script on each, then a second.
        self._places = {f'{gpu.ident}.{n}' if n else gpu.ident: (gpu, n) for n in range(per_gpu) for gpu in gpus}
        self._shared: set[Any] = set()  # places whose GPU already had a script when we last tried them

    def all_ids(self) -> list[Any]:
        """Return the GPUs: their numbers, in NVML's order or in that of CUDA_VISIBLE_DEVICES, or UUIDs."""
        return list(self._places)

    def demand(self, script: StrPath) -> int:
        """Return how many GPUs the script asks for. Raises FastgpuError where it asks for no number of them."""
        return gpus_wanted(script)

    def distinct(self, ident: Any) -> Any:
        """Return the GPU: a script that asks for two does not want two places on one."""
        return self._places[ident][0]

    def lock_path(self, ident: Any) -> Path:
        """Return the lock file of a GPU, or of a place on one, which all users of the host share."""
        gpu, n = self._places[ident]
        return self._lock_file(f'{gpu.uuid}.{n}' if self.per_gpu > 1 else gpu.uuid)

    def _lock_file(self, name: str) -> Path:
        """Return the lock file of that name."""
        return Path(os.environ.get('FASTGPU_LOCK_DIR') or '/tmp', f'fastgpu-{name}.lock'.replace('/', '_'))

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return FASTGPU_ID and what makes CUDA see these GPUs alone, counted as NVML counts."""
        gpus = ','.join(str(self._places[ident][0].ident) for ident in ids)
        return {'FASTGPU_ID': gpus, 'CUDA_VISIBLE_DEVICES': gpus, 'CUDA_DEVICE_ORDER': 'PCI_BUS_ID'}

    def is_available(self, ident: Any) -> bool:
        """Return whether the GPU is free by what the driver says. Where it is not, the log tells why.

        Between the questions it files what has ended, since a driver can take seconds for an answer.
        """
        if not super().is_available(ident):
            return False
        gpu = self._places[ident][0]
        try:
            used, total = self._driver.memory(gpu)
            self._keep_up()
            pids = self._driver.pids(gpu)
            self._keep_up()
            if self._said.pop('/driver', None):
                log('the NVIDIA driver is back')
                numbers = {found.uuid: found.index for found in self._driver.gpus()}
                if any(numbers.get(each.uuid) != each.index for each, _ in self._places.values()):
                    for each, _ in self._places.values():
                        each.ident = each.uuid  # for CUDA the numbers now mean others
        except DriverError as error:
            self._say('/driver', f'the NVIDIA driver is gone ({shown(error)}): nothing starts until it is back')
            return False
        except GpuError as error:
            self._reasons[ident] = f'unusable: {shown(error)}'
            return False
        if ident in self._shared:
            busy = total - used < total / self.per_gpu
            rule = f'; one more script needs {memory_text(total / self.per_gpu)} of {memory_text(total)} free'
        else:
            busy = bool(pids) or used > self.max_used
            rule = f'; free is up to {memory_text(self.max_used)}' if not pids else ''
        if busy:
            users = ', '.join(map(process_text, pids)) or 'no compute process'
            self._reasons[ident] = f'busy: {memory_text(used)} used by {users}{rule}'
        return not busy

    def look(self, ident: Any) -> dict[str, Any]:
        """Return whether a GPU is free, why if not, its model and its memory."""
        gpu = self._places[ident][0]
        seen: dict[str, Any] = {'model': gpu.model, 'memory_used': None, 'memory_total': None,
                                'state': 'busy', 'reason': 'a poller asks whether it is free'}
        ask = self._lock_file(f'{gpu.uuid}.ask')
        asking = None
        with contextlib.suppress(OSError):
            asking = take_lock(ask) if os.path.lexists(ask) else -1  # none: no poller was ever here
        if asking is not None:
            seen.update(super().look(ident))
            if asking >= 0:
                os.close(asking)
        with contextlib.suppress(GpuError):
            seen['memory_used'], seen['memory_total'] = map(round, self._driver.memory(gpu))
        return seen

    # Several scripts per GPU. Each place has a lock of its own, and the lock of the GPU is shared by the scripts that
    # have one. Who gets the GPU's lock exclusively knows that no script has a place on it, asks whether the GPU is
    # free, and only then shares the lock. All that is done under one more lock, which is held by no script: so a lock
    # that cannot be had exclusively is held by one, not by somebody who only asks.

    def _try(self, ident: Any, test: Any = None, keep: bool = False) -> bool:
        """Lock and test as ever, but one poller at a time for each GPU."""
        try:
            asking = take_lock(self._lock_file(f'{self._places[ident][0].uuid}.ask'))
        except OSError as error:
            self._reasons[ident] = f'unusable: {explain(error)}'
            return False
        if asking is None:
            return False
        try:
            return super()._try(ident, test, keep)
        finally:
            os.close(asking)

    def _take(self, ident: Any) -> list[int] | None:
        """Lock a place, and with several per GPU the GPU too: exclusively if it can be, else shared."""
        fds = super()._take(ident)
        if fds is None or self.per_gpu == 1:
            return fds
        path = self._lock_file(self._places[ident][0].uuid)
        try:
            fd = take_lock(path)
            if fd is not None:
                self._shared.discard(ident)
                write_note(fd, f'shared by scripts of user {os.getuid()} ({self.path})')
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return [*fds, fd]
            fd = take_lock(path, fcntl.LOCK_SH)
            if fd is not None:
                self._shared.add(ident)
                return [*fds, fd]
            self._blame(ident, path)
        except OSError:
            os.close(fds[0])
            raise
        os.close(fds[0])
        return None


# --- Status: what there is to see, for everybody who may read the folders -------------------------------------------

def look_at_queue(pool: ResourcePoolBase) -> dict[str, Any]:
    """Return the state of the queue of `pool`: what `fastgpu_poll --status --json` prints, see the README.

    Takes nothing and changes nothing. Raises OSError where a folder cannot be read.
    """
    queue = pool.queue
    waiting = scripts_in(queue.to_run)
    names = {folder.name: names_in(folder) for folder in (queue.running, queue.complete, queue.fail)}
    alive = is_held(queue.alive)
    runs = [look_at_run(queue, name) for name in names['running']]
    rows = [{'kind': pool.kind, 'id': ident, 'script': None, 'user': None, 'seconds': None, **pool.look(ident)}
            for ident in pool.all_ids()]
    for run in runs:
        for ident in run['ids'] if run['host'] == queue.host else ():
            row = next((row for row in rows if (row['kind'], row['id']) == (run['kind'], ident)), None)
            if row is None:
                rows.append(row := {'kind': run['kind'] or 'resource', 'id': ident})
            row.update({key: run[key] for key in ('script', 'user', 'seconds')}, state='running', reason=None)
            if not (alive or runs_shim(run['pid'], queue.out_file(run['script'], 'exitcode'))):
                row.update(state='ended', seconds=None, reason='the next fastgpu_poll files it')
    ended = names['complete'] + names['fail']
    some = [look_at_run(queue, name)['seconds'] for name in ended[::len(ended) // 100 + 1]]
    known = [seconds for seconds in (*some, *(run['seconds'] for run in runs)) if seconds is not None]
    left = None
    if alive and ended and known and (waiting or runs):
        left = round(time_left(sum(known) / len(known), len(waiting), len(runs) or len(rows)), 1)
    last = sorted(names['fail'], key=lambda name: (file_mark(queue.fail / name)[2:], name), reverse=True)[:3]
    return {
        'path': str(queue.path), 'host': queue.host, 'poller': alive, 'resources': rows,
        'elsewhere': [run for run in runs if run['host'] != queue.host],
        'counts': {'to_run': len(waiting), **{folder: len(scripts) for folder, scripts in names.items()}},
        'next': [name for name, reason in waiting.items() if reason in ('', 'just written')][:3],
        'failed': [{'script': name, 'stderr': path, 'last_line': last_line(path)}
                   for name in last for path in [queue.out_file(name, 'stderr')]],
        'seconds_left': left}


def look_at_run(queue: Queue, name: str) -> dict[str, Any]:
    """Return what the record of the run `name` says, and how long it took or has taken."""
    record: dict[str, Any] = {}
    user = seconds = None
    with contextlib.suppress(OSError, TypeError):
        with open(open_quietly(queue.out_file(name, 'json')), 'rb') as file:
            record, user = read_record(file.fileno()), user_name(os.fstat(file.fileno()).st_uid)
        if record:
            seconds = round(max(0.0, record.get('finished', time.time()) - record['started']), 1)
    return {'script': name, 'host': record.get('host'), 'kind': record.get('kind'), 'ids': record.get('ids', []),
            'pid': record.get('pid'), 'user': user, 'seconds': seconds}


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
    with contextlib.suppress(BrokenPipeError):
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)


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
