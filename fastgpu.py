#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["nvidia-ml-py>=12.550.52"]
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

`fastgpu_poll --run CMD` is one command on the next free GPU, without any folder.

How it works, and why nothing is lost, in the order in which it happens to a script:

- It is in exactly one of to_run, running, complete and fail, and nothing but a rename ever moves it.
- The first script in to_run gets the first resource that nobody has. Who has a GPU is said by locks in a file that all
  users of the host share: those of fcntl(2) that belong to an open file. The kernel drops them with the last who has
  that file open, so none is ever left over; and a file has many, one per byte: a place on the GPU, all of them, or
  the right to ask the driver whether it is free, so that what it answers stays true until the place is taken.
- Who waits for a GPU holds a byte of its file too, whose number is the time since when: who has waited longest goes
  first, whatever queue or user it is, and whose script has just left it waits behind all. Who needs several and has
  waited longest of all such keeps those that it gets.
- The run reserves its name by creating out/NAME.json with O_EXCL, and locks that record; then the script moves to
  running. So two pollers never take the same script, and a name in running, complete, fail and out means one run, for
  ever: the second run of train.sh is train-1.sh.
- It runs under one line of /bin/sh, in a session of its own, which writes its exit status to out/NAME.exitcode even if
  the poller is dead by then, or the queue was moved. Both have the files of the record and of the GPU open: so the
  locks last as long as the script does, whatever becomes of the poller.
- When it has ended, its GPU goes to the next script before it is collected: no GPU waits for that.
- A name in running whose record nobody locks has ended, and a poller collects it: with an exit status it goes to
  complete or fail, without one it was cut off and goes back to to_run. Any poller on the same kernel does that (by the
  boot id in the record), again and again if need be: what that needs is in the folders and in the kernel, and nothing
  else could be wrong.

The sections below follow the data: messages, folders, locks, runs, pools of resources, GPUs, the poller with its loop,
the status, the command.
"""
from __future__ import annotations

try:
    import argparse
    import contextlib
    import errno
    import fcntl
    import functools
    import glob
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
    import threading
    import time
    import warnings
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Any, NamedTuple, TextIO, Union
except KeyboardInterrupt:  # Ctrl-C before there is anything to stop
    raise SystemExit(130) from None

__version__ = '0.1.0'
__all__ = ['FastgpuError', 'FixedWorkerPool', 'ResourcePoolBase', 'ResourcePoolGPU', 'find_next_script', 'main',
           'safe_rename', 'setup_dirs']

StrPath = Union[str, 'os.PathLike[str]']

JUST_WRITTEN = 0.1  # seconds in which a file that was written to may still be being copied
LOOK_AROUND = 1.0   # seconds between two looks at the runs of others
OVERDUE = 3.0       # seconds after which whoever should have collected a script that ended is taken to be dead
STEP_BACK = 0.25    # seconds for which what is free is left to who has waited longer
KEPT = 'PATH', 'LD_LIBRARY_PATH', 'PYTHONPATH', 'VIRTUAL_ENV', 'CONDA_PREFIX'  # where programs and libraries are
AT_ONCE = 10.0      # seconds in which a script fails that could never work, or whose GPU is sick
SHOWS = 30.0        # seconds until what uses CUDA is seen by the driver
LINGER = 5.0        # seconds for which the memory of a killed script of ours may still be in use
HUSH = 60.0         # seconds between two lines on why the same resource is not free
GRACE = 10.0        # seconds that a script has between TERM and KILL


class FastgpuError(Exception):
    """Wrong use, or a queue or GPUs that cannot be used; the text says what to do about it."""


# --- Messages: lines on stderr, safe to print whatever a file is called ---------------------------------------------

def write(stream: TextIO, text: str) -> str:
    """Write `text` to standard output or error, with what its encoding lacks escaped; return why that failed, or ''.

    What nobody reads (EPIPE) is no failure.
    """
    try:
        encoding = stream.encoding or 'utf-8'
        stream.write(text.encode(encoding, 'backslashreplace').decode(encoding))
        stream.flush()
    except OSError as error:
        # What is left in its buffer would fail again when Python ends, and make its exit status 120.
        with open(os.devnull, 'w') as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        return '' if error.errno == errno.EPIPE else explain(error)
    return ''


class Log:
    """Lines on stderr, and on a terminal one more below them, which tells how far things are.

    They are worth less than the work: what cannot be written at once, since nobody reads, is only counted.
    """

    def __init__(self) -> None:
        self._bottom = ''
        self._lost = 0

    def __call__(self, text: str, alarm: bool = False) -> None:
        """Write `text`, escaped, and the time, to a file with the date; to a terminal an `alarm` in red."""
        on_terminal = self._terminal()
        text = f'{time.strftime("%H:%M:%S" if on_terminal else "%Y-%m-%dT%H:%M:%S")} {shown(text)}'
        if alarm and on_terminal and not os.environ.get('NO_COLOR'):
            text = f'\033[31m{text}\033[0m'
        if self._lost and self._write(f'({count(self._lost, "line")} of this log lost: nobody read it)\n'):
            self._lost = 0
        self._lost += not self._write(text + '\n')

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

    def _write(self, lines: str) -> bool:
        """Write `lines` above the line at the bottom, if that can be done now; return whether it was."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._terminal():
                width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some containers tell 0
                lines = f'\r\033[K{lines}{self._bottom[:width - 1]}'
            if sys.stderr is not sys.__stderr__ or sys.__stderr__ is None:  # of a notebook, say; or it was closed
                return not write(sys.stderr, lines)
            # Not by way of its buffer: what that could not write would be tried again when Python ends, and fail.
            data = lines.encode(errors='backslashreplace')
            return os.write(opened_anew(sys.__stderr__.fileno()), data) == len(data)
        return False


log = Log()


@functools.cache  # opened once
def opened_anew(fd: int) -> int:
    """Return the open file `fd`, or a pipe or terminal that it is, opened anew: so that to write there never waits.

    That is a property of the open file, which we share with whoever started us.
    """
    with contextlib.suppress(OSError):  # a terminal of another user, as after su(1), or a socket
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return os.open(f'/proc/self/fd/{fd}', os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


def shown(text: object) -> str:
    """Return `text` with everything escaped that could garble a terminal: control characters, invalid UTF-8."""
    text = str(text)
    return text if text.isprintable() else ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explain(error: Exception) -> str:
    """Return what an error says, for people: an OSError as `file: reason`."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    reason = 'is not a folder' if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
    names = ' -> '.join(os.fsdecode(name) for name in (error.filename, error.filename2) if name)
    return f'{names}: {reason}' if names else reason


def complain(text: str) -> None:
    """Write `text`, escaped, to standard error, as what the command has to say."""
    write(sys.stderr, f'fastgpu_poll: {shown(text)}\n')


def near(path: StrPath) -> str:
    """Return `path` as seen from the current folder, if it lies below that."""
    with contextlib.suppress(OSError, ValueError):
        return str(Path(path).relative_to(os.getcwd()))
    return str(path)


def remark(reason: str, path: StrPath) -> str:
    """Return what a script said last, the `reason` that it failed, and the file that tells more."""
    return f'{reason or "said nothing"} ({near(path)})'


def duration(seconds: float) -> str:
    """Return `seconds` as people read it: `8.1 s`, or `1:02:03` from a minute on."""
    if seconds < 60:
        return f'{max(0.0, seconds):.1f} s'
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def count(number: int, thing: str) -> str:
    """Return `1 thing` or `2 things`."""
    return f'{number} {thing}' + 's' * (number != 1)


def listed(names: Sequence[str]) -> str:
    """Return the first ten of these `names`, quoted for a shell, and how many more there are."""
    return shlex.join(names[:10]) + f' and {len(names) - 10} more' * (len(names) > 10)


def time_left(mean: float, waiting: int, running: int) -> float:
    """Return the seconds until so many scripts have ended, if each takes the `mean` of those that are complete."""
    return mean * (waiting + running / 2) / max(1, running)


@functools.cache  # a directory service can take long to answer
def user_name(uid: int) -> str:
    """Return the name of a user, or the number where there is none."""
    import pwd  # here, because only who locks or looks needs it
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


def others_can_write(folder: os.stat_result) -> bool:
    """Return whether somebody else than its owner can write to a folder: by its mode, but for his own private group.

    That is one of his name without other members, as many systems make for each user, with a umask of 002.
    """
    if folder.st_mode & stat.S_IWGRP:
        import grp  # here, because few need it
        with contextlib.suppress(KeyError):
            owner, group = user_name(folder.st_uid), grp.getgrgid(folder.st_gid)
            return bool(folder.st_mode & stat.S_IWOTH) or owner != group.gr_name or not {*group.gr_mem} <= {owner}
    return bool(folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def check_safe(path: Path, folders: list[Path]) -> None:
    """Raise FastgpuError, with the remedy, where others could have their code run by us in a queue in `path`.

    Looks at what is there of it and its `folders`. Logs a warning where they could put another queue in its place.
    """
    me, unsafe = os.geteuid(), []
    for folder in filter(os.path.isdir, (path, *folders)):
        status = folder.stat()
        if status.st_uid != me and not (folder == path and status.st_uid == 0):
            owner, mend = user_name(status.st_uid), f'chown -R {user_name(me)} {shlex.quote(str(path))}'
            raise FastgpuError(f'{folder} belongs to {owner}: run it as {owner}, take a --path of your own, or '
                               f'make it yours: sudo {mend}')
        # Others cannot rename what is ours in a folder like /tmp: restricted deletion flag, chmod(1).
        if others_can_write(status) and not (folder == path and status.st_mode & stat.S_ISVTX):
            unsafe.append(shlex.quote(str(folder)))
    if unsafe:
        raise FastgpuError(f'others could have their code run as you; mend it with: chmod go-w {" ".join(unsafe)}')
    for parent in path.parents:
        status = parent.stat()
        if others_can_write(status) and not status.st_mode & stat.S_ISVTX:
            log(f'warning: others can write to {parent}, and put another queue in the place of this one')


def check_usable(folders: list[Path]) -> None:
    """Raise FastgpuError, with the remedy, where a queue with these `folders` could not work."""
    for folder in folders:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise FastgpuError(f'{folder}: no permission to write there; mend it with: '
                               f'chmod u+rwx {shlex.quote(str(folder))}')
    for folder in folders[:4]:
        if folder.stat().st_dev != folders[0].stat().st_dev:
            raise FastgpuError(f'{folder} is on another file system than {folders[0]}: '
                               'scripts could not be moved between them')
    if os.path.samefile(folders[0], folders[1]):
        raise FastgpuError(f'{folders[1]} is the same folder as {folders[0]}: make it one of its own')
    if os.statvfs(folders[1]).f_flag & os.ST_NOEXEC:
        raise FastgpuError(f'{folders[1]} is on a file system mounted noexec: no script can run from there')


# What keeps a file in to_run from being started, where it is more than something to be told.
IGNORED = 'ignored'  # no script at all: a folder, a FIFO, a name that is gone
NOT_EXECUTABLE = 'waits for its chmod +x'
FRESH = 'just written'
ENDING = 'its last run ends just now'
UNSEEN = 'cannot be seen now'  # by a file server that hiccups
PASSING = FRESH, ENDING, UNSEEN


def condition(path: StrPath, clock: Callable[[float], float] = lambda stamp: time.time()) -> str:
    """Return what keeps the file `path` from being run: nothing (''), or the reason in a few words.

    The `clock` gives the time by which a file with a time `stamp` was just written.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return 'a link that leads nowhere' if os.path.islink(path) else IGNORED
    except OSError as error:
        return 'a link that leads to itself' if error.errno == errno.ELOOP else UNSEEN
    if not stat.S_ISREG(status.st_mode):
        return IGNORED
    if not os.access(path, os.X_OK):
        return NOT_EXECUTABLE if os.path.lexists(path) else IGNORED
    # A time stamp in the future (a clock that was set back, a copy that keeps its time) is not "just now". Some file
    # systems have whole seconds only.
    if 0 <= clock(status.st_mtime) - status.st_mtime < JUST_WRITTEN + (status.st_mtime_ns % 10**9 == 0):
        return FRESH
    return '' if status.st_size else 'empty'


def names_in(folder: StrPath) -> list[str]:
    """Return the names in `folder` in sorted order, but for hidden ones and those that editors give what they leave."""
    return sorted(name for name in os.listdir(folder)
                  if not name.startswith(('.', '#')) and not name.endswith(('~', '.bak', '.orig', '.swp')))


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

    A script is a regular file, or a link to one, whose name is not hidden and not that of what an editor leaves, which
    is executable, not empty, and was not written to within the last 0.1 s: someone may still be copying it. Raises
    OSError where `p` cannot be read.
    """
    return next((Path(p) / name for name in names_in(p) if not condition(os.path.join(p, name))), None)


def numbered(name: str, n: int) -> str:
    """Return the name of the n-th further run of the script `name`: `train.sh`, `train-1.sh`, `train-2.sh`."""
    stem, suffix = os.path.splitext(name)
    return f'{stem}-{n}{suffix}' if n else name


@functools.cache  # to load the C library anew takes as long as the rename itself
def renameat2() -> Callable[[bytes, bytes], int]:
    """Return what renames, by renameat2(2) with RENAME_NOREPLACE, and returns the number of its error, or 0."""
    try:
        import ctypes  # here, because it costs a start that needs none of it 5 ms
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError):
        return lambda source, target: errno.ENOSYS
    cwd, noreplace = -100, 1
    return lambda source, target: ctypes.get_errno() if call(cwd, source, cwd, target, noreplace) else 0


def rename_new(source: StrPath, target: StrPath) -> None:
    """Rename like os.rename, but raise FileExistsError where that would overwrite `target`.

    One step with renameat2(2) and RENAME_NOREPLACE; where the C library, the kernel or the file system (NFS) has no
    such call, a second name and then not the first, which a crash between the two leaves to be done again; where there
    are no second names either (sshfs), a look and an os.rename.
    """
    code = renameat2()(os.fsencode(source), os.fsencode(target))
    if not code:
        return
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if not is_same(source, target):
            raise
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)
        return
    os.unlink(source)


def is_same(one: StrPath, other: StrPath) -> bool:
    """Return whether these are two names of one file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(one), os.lstat(other))
    return False


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


class Queue:
    """The folders of a queue, as this host sees them."""

    def __init__(self, path: StrPath, only_look: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self.here = this_host()
        self.host = self.here['host']
        self.folders = queue_folders(self.path)
        self.to_run, self.running, self.complete, self.fail, self.out = self.folders
        self.alive = f'{self.path}/.{self.host}.poller'  # in which each poller of this host locks the byte of its pid
        self._clock = 0.0  # the time of the file system when we looked last
        self._seen: dict[Path, os.stat_result] = {}  # which folders these were when we began to poll
        self.is_new = not os.path.isdir(self.to_run)
        if not only_look:
            check_safe(self.path, self.folders)
            setup_dirs(self.path)
            check_usable(self.folders)

    def check_is_there(self) -> None:
        """Raise FileNotFoundError where the queue was moved, or its file system unmounted, since it was `announced`."""
        if not (self._seen and all(os.path.samestat(seen, os.stat(folder)) for folder, seen in self._seen.items())):
            raise FileNotFoundError(errno.ENOENT, 'was moved, or unmounted, and is another folder now', str(self.path))

    def mend(self) -> None:
        """Make `complete` and `fail` anew where they are missing, in what is still the queue, if that can be done."""
        with contextlib.suppress(OSError):
            self.check_is_there()
            for folder in (self.complete, self.fail):
                folder.mkdir(mode=0o755, exist_ok=True)

    def clock(self, stamp: float) -> float:
        """Return a time by the clock of the file system, which gives files their stamps; so late that `stamp` is past.

        It may be slow, but not where that would make a file with this `stamp` seem just written, or not so.
        """
        if stamp > self._clock - JUST_WRITTEN - 1:
            try:  # by writing: a stamp that one sets is that of this host, on some file systems
                with open(open_lock(f'{self.path}/.{self.host}.clock'), 'r+b', 0) as file:
                    file.write(b'the time of this file is that of its file system\n')
                    self._clock = os.fstat(file.fileno()).st_mtime
            except OSError:
                return time.time()
        return self._clock

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Let whoever looks know, in a `with` block, that a poller of this host is alive.

        Raises OSError, and FastgpuError where there are no locks: on a kernel before 3.15, on some file systems.
        """
        with contextlib.ExitStack() as stack:
            alive = open_lock(self.alive)
            stack.callback(close, alive)
            try:
                Place(self.alive, os.getpid(), 1).lock(alive)
            except OSError as error:
                raise FastgpuError(f'{self.path}: no locks there ({error.strerror}): a queue needs Linux 3.15 or '
                                   'newer, and a file system that has locks') from None
            for folder in (self.path, self.to_run, self.running):
                # Kept open, because sshfs numbers anew, when its server was away, what nobody has open.
                fd = os.open(folder, os.O_PATH)
                stack.callback(close, fd)
                self._seen[folder] = os.fstat(fd)
            yield

    def pollers(self) -> list[int]:
        """Return the pids of the pollers of this host that are alive."""
        with contextlib.suppress(OSError), open(open_quietly(self.alive), 'rb', 0) as file:
            return Place(self.alive, 0, 1 << 22).locked(file.fileno())  # as many as there can be, proc(5)
        return []

    def claim(self, script: str, kind: str, ids: Sequence[Any]) -> Run:
        """Move `script` from to_run to running, under the first name that no run had yet, and write its record.

        Raises FastgpuError where that can never be done, OSError where it cannot now, FileNotFoundError if the script
        is gone. Nothing is left of the claim then.
        """
        n, run = 0, Run(self, script)
        while not run.reserve():
            n += 1
            run = Run(self, numbered(script, n))
        try:
            run.record.place.lock(run.record.fd)
            # As they will be read again.
            known = [ident if isinstance(ident, (str, int, float)) else str(ident) for ident in ids]
            run.record.update(script=script, **self.here, kind=kind, ids=known, started=round(time.time(), 3))
            run.record.save()
            # From here on, a name in running/ whose record is not locked has no owner.
            os.rename(f'{self.to_run}/{script}', run.path)
        except BaseException as error:
            # On NFS the reply to a rename can be lost, and its repetition finds nothing to rename.
            if not (isinstance(error, FileNotFoundError) and os.path.lexists(run.path)):
                run.unclaim()
                if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EBUSY, errno.EXDEV):
                    raise FastgpuError(f'it cannot be moved: {error.strerror}') from None
                raise
        return run


# --- Locks: bytes of a file, which a child inherits, and which the kernel gives back with the last who holds them ---

def open_quietly(path: StrPath, flags: int = os.O_RDONLY) -> int:
    """Open what may be anything, without following or waiting for it. Raises OSError, also for all but a file."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        close(fd)
        raise OSError(errno.EISDIR, 'is not a file', str(path))
    return fd


def close(fd: int) -> None:
    """Close a file, once: also where a file server answers EIO, its number is free, and soon another's, close(2).

    -1, which stands for none, is none to close.
    """
    with contextlib.suppress(OSError):
        os.close(fd)


def open_lock(path: StrPath) -> int:
    """Open the lock file `path`, made where it is missing, in a folder in which others may plant files.

    Raises OSError, with a reason for people, for anything that is not a lock file: a link, a FIFO.
    """
    try:
        # Without O_CREAT where it exists: the kernel refuses that for the files of others in a sticky folder
        # (fs.protected_regular in proc(5)).
        fd = open_quietly(path, os.O_RDWR)
    except FileNotFoundError:
        mask = os.umask(0)  # all users of the host share it
        try:
            # The sticky bit keeps systemd-tmpfiles from removing it when it is old: tmpfiles.d(5), "Age".
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o1666)
        except FileExistsError:  # somebody was faster
            return open_lock(path)
        finally:
            os.umask(mask)
    # A second name could be a file of ours, which we would write to (fs.protected_hardlinks).
    if os.fstat(fd).st_nlink > 1:
        close(fd)
        raise OSError(errno.EINVAL, 'is not a lock file: it has a second name', str(path))
    return fd


def since_when(note: str) -> str:
    """Return what there is to add to a note `runs NAME of USER (pid PID, PATH)` of a script that has ended, or ''."""
    match = re.fullmatch(r'runs (.+) of \S+ \(pid \d+, (/.+)\)', note)
    with contextlib.suppress(OSError, ValueError):  # anybody can write to it what is no path
        ago = time.time() - os.stat(f'{match[2]}/out/{match[1]}.exitcode').st_mtime if match else 0
        if ago > OVERDUE:
            return f', which ended {duration(ago)} ago: its poller stands still (Ctrl-Z?), or a daemon of it lives'
    return ''


class Place(NamedTuple):
    """Bytes of a lock file that are held together: by default the whole resource, else one place of many on it.

    The locks are those of fcntl(2) that belong to an open file, as those of flock(2) do: they outlive whoever took
    them for as long as a child has that file open. Unlike those, one file has many of them, one per byte.
    """
    path: str
    first: int = 0
    number: int = 1 << 20  # of bytes

    @property
    def asking(self) -> Place:
        """The place behind all others, which is held by who asks whether one of them is free."""
        return Place(self.path, 1 << 20, 1)

    def lock(self, fd: int) -> bool:
        """Lock it in the open file `fd`, if nobody else has it and its path leads to that file. Raises OSError.

        A file that was deleted meanwhile can be locked by us and its successor by somebody else: that is no lock.
        """
        try:
            self._call(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK)
        except (BlockingIOError, PermissionError):  # POSIX and fcntl(2) allow both EAGAIN and EACCES for "held"
            return False
        return self.is_in(fd)

    def is_in(self, fd: int) -> bool:
        """Return whether its path leads to the open file `fd`. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.stat(self.path, follow_symlinks=False))
        return False

    def unlock(self, fd: int) -> None:
        """Give it back, also if a daemon that a script left behind still has the file open. Raises OSError."""
        self._call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK)

    def locked(self, fd: int) -> list[int]:
        """Return where each lock begins that others have on it or a part of it, in order.

        Takes nothing. Raises OSError.
        """
        found, parts = [], [(self.first, self.first + self.number)]
        while parts:
            first, end = parts.pop()
            if first >= end:
                continue
            lock = Place(self.path, first, end - first)._call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK)
            kind, _, start, number, _ = struct.unpack(FLOCK, lock)
            if kind != fcntl.F_UNLCK:  # it is one of them, and not always the first
                found.append(max(first, start))
                parts += [(first, start), (start + number if number else end, end)]
        return sorted(found)

    def holder(self, fd: int) -> str:
        """Return who has it or a part of it, by what they wrote in the open file `fd`, '' where nobody has it.

        That is for people only: anybody can write to the file. Raises OSError.
        """
        lock = self.locked(fd)
        if not lock:
            return ''
        note = os.pread(fd, NOTE, NOTE * lock[0]).decode('utf-8', 'replace').strip('\0\n ')
        who = note.replace(f' of {user_name(os.getuid())} (', ' of yours (') + since_when(note)
        return shown(who or f'locked, and not by fastgpu (fuser -v {self.path} tells by whom)')

    def why_locked(self) -> str:
        """Return why it is not free: '', or `busy: who`, or `unusable: why`."""
        try:
            with open(open_quietly(self.path), 'rb', 0) as file:
                who = self.holder(file.fileno())
        except FileNotFoundError:
            return ''
        except OSError as error:
            return f'unusable: {explain(error)}'
        return who and f'busy: {who}'

    def write_note(self, fd: int, text: str) -> None:
        """Say who has it, for people. All notes are as long: to truncate a file can take 0.3 ms."""
        with contextlib.suppress(OSError):
            os.pwrite(fd, shown(text).encode('utf-8', 'replace')[:NOTE - 1].ljust(NOTE - 1) + b'\n', NOTE * self.first)

    def _call(self, fd: int, command: int, kind: int) -> bytes:
        """Make the call of fcntl(2) for it, with and for a `struct flock`. Raises OSError."""
        return fcntl.fcntl(fd, command, struct.pack(FLOCK, kind, os.SEEK_SET, self.first, self.number, 0))


FLOCK = 'hhqqi'  # struct flock of fcntl(2): type, whence, start, length, pid
NOTE = 256  # bytes for each place in its file, which say who has it
WAITING = 1 << 21  # the byte of a lock file from which on those wait who would like to have what it locks
SEVERAL = 1 << 61  # the same for who needs several such files at once


class Line:
    """A line of those who wait at a lock file, and our place in it.

    That is a byte too: its number, from `base` on, is the time since when one waits, in µs of the clock that all
    processes of a host share. So whose is lower has waited longer, and the kernel drops it with who waits.
    """

    def __init__(self, path: str, base: int) -> None:
        self.path, self.base = path, base
        self.since = 0  # our place, 0 where we do not wait
        self.fd = -1  # has it

    def join(self, now: int) -> None:
        """Wait, if we do not yet, since `now`, in ns; where there can be no lock, without a place in the line."""
        with contextlib.suppress(OSError):
            if self.fd >= 0 and not Place(self.path).is_in(self.fd):  # somebody removed the file
                self.leave()
            if self.fd < 0:
                self.fd = open_lock(self.path)
            place = Place(self.path, self.base + now // 1000, 1)
            if not self.since and place.lock(self.fd):
                self.since = place.first

    def leave(self) -> None:
        """Wait no longer."""
        fd, self.fd, self.since = self.fd, -1, 0
        close(fd)

    def before_us(self, fd: int) -> int:
        """Return how many wait there, in the open file `fd`, and have longer than we. Raises OSError."""
        ours = self.since or self.base + time.monotonic_ns() // 1000
        return len(Place(self.path, self.base, ours - self.base).locked(fd))


# --- Runs: a script, from its claim until it is collected -----------------------------------------------------------

# The shell that runs a script. It outlives the poller, and signals to its group until the script is done; it writes
# the status of the words after its first to the file that is its first. A trap that is set, unlike a signal that is
# ignored, is not inherited by what it runs. Where the shell cannot even fork it exits with NOT_STARTED. `set +e` is
# for an environment with SHELLOPTS=errexit, the long names are for one that has short ones; none has the word fastgpu,
# since people type `pkill -f fastgpu`. It has the folder of the file open, and writes there even if the queue moves,
# or by its name where it was made anew. Where a file server is away it tries for a minute; not where only the disk is
# full, since the poller that waits for the shell knows what it writes.
NOT_STARTED, NO_PROCESS = 254, 'no process to be had for the script'
SHIM = ('set +e; _job_file=$1 _job_here=$2 _job_status= _job_tries=; shift 2; '
        'trap : HUP INT QUIT PIPE ALRM TERM USR1 USR2; '
        f'trap \'[ "$_job_status" ] || {{ echo "{NO_PROCESS}" >&2; exit {NOT_STARTED}; }}\' EXIT; '
        '"$@"; _job_status=$?; '
        '_job_write() { printf %s $_job_status >"$_job_here" || printf %s $_job_status >"$_job_file"; } 2>/dev/null; '
        'until _job_write || { [ -d "${_job_here%/*}" ] && { _job_write; true; }; } || [ ${#_job_tries} = 60 ]; '
        'do _job_tries=x$_job_tries; sleep 1; done; exit $_job_status')


def this_host() -> dict[str, str]:
    """Return what tells this host from others: its name, its kernel's boot id (random(4)), its machine-id(5) or ''."""
    here = {'host': os.uname().nodename}
    for key, file in ('boot', '/proc/sys/kernel/random/boot_id'), ('machine', '/etc/machine-id'):
        here[key] = ''
        with contextlib.suppress(OSError), open(file) as id_file:
            here[key] = id_file.read(64).strip()
    here['pids'] = os.readlink('/proc/self/ns/pid')  # the namespace by which pids are counted, pid_namespaces(7)
    return here


def parse_record(text: bytes) -> dict[str, Any]:
    """Return the record that is written as `text`; {} where that is none of ours, or what a power cut left of one."""
    with contextlib.suppress(ValueError, TypeError, LookupError, OverflowError, RecursionError):
        record = json.loads(text)
        script = record['script']
        os.fsencode(script)
        times = {key: float(record[key]) for key in ('started', 'finished') if key in record or key == 'started'}
        if (script == os.path.basename(script) and script[0] != '.' and all(abs(each) < 1e12 for each in times.values())
                and isinstance(record['host'], str) and isinstance(record['ids'], list)
                and all(isinstance(ident, (str, int, float)) for ident in record['ids'])
                and isinstance(record.get('pid', 0), int)):
            return {**record, **times}
    return {}


def is_dying(pid: int, flags: int) -> bool:
    """Return whether a process with these `flags` of proc(5) has begun to exit (PF_EXITING), or KILL waits for it."""
    with open(f'/proc/{pid}/status') as file:
        pending = re.findall('(?m)^S(?:ig|hd)Pnd:\\s*([0-9a-f]+)', file.read())
    return bool(flags & 0x4) or any(int(mask, 16) & 1 << signal.SIGKILL - 1 for mask in pending)


def session_groups(leader: int, dying: bool = True) -> set[int]:
    """Return the process groups that are alive in the session of `leader`: timeout(1) and `set -m` make their own.

    A zombie is not alive; without `dying`, nor is what got KILL and may not have noticed, or has begun to exit.
    """
    groups = set()
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        with contextlib.suppress(OSError, ValueError):
            with open(f'/proc/{pid}/stat', 'rb') as file:
                state, _, group, session, _, _, flags = file.read().rpartition(b')')[2].split()[:7]
            if int(session) == leader and state != b'Z' and (dying or not is_dying(int(pid), int(flags))):
                groups.add(int(group))
    return groups


def pids_with(path: str) -> list[int]:
    """Return the pids of the other processes of this user that have a file open (proc(5), fd)."""
    pids = set()
    for process in map(Path, glob.iglob('/proc/[0-9]*')):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) == path for fd in os.scandir(process / 'fd')):
                pids.add(int(process.name))
    return sorted(pids - {os.getpid()})


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
        lines = re.split('[\r\n]', file.read().decode('utf-8', 'replace'))  # a progress bar ends in \r
        return next((line.strip() for line in reversed(lines) if line.strip()), '')[:200]
    return ''


def first_line_trouble(script: Path, code: int | None) -> str:
    """Return what is wrong with the first line of a `script` that failed with the status `code`, and the remedy, or ''.

    The shell says only that the script was not found, which it plainly was, or takes Python for a language of its own.
    """
    with contextlib.suppress(OSError), open(script, 'rb') as file:
        line = file.readline(300).rstrip(b'\n')
        if line.startswith(b'\xef\xbb\xbf#!'):
            return 'a byte order mark stands before its #!: save it without one'
        if not line.startswith(b'#!'):
            return 'it has no #! line, so /bin/sh ran it: for Python, begin it with #!/usr/bin/env python3'
        interpreter = os.fsdecode(line[2:].strip(b' \t').split(b' ')[0])
        if line.endswith(b'\r'):
            return f"it has the line ends of Windows: sed -i 's/\\r$//' {shlex.quote(str(script))} mends that"
        if code == 127 and not os.path.isabs(interpreter):
            return f'its #! line needs a path: #!/usr/bin/env {interpreter}'
        if code == 127 and not os.path.exists(interpreter):
            return f'its interpreter {interpreter} does not exist'
    return ''


class Record(dict[str, Any]):
    """What is known of a run: a dict that is kept in the file `path`, whose lock somebody holds while the run lives."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.place = Place(path)
        self.fd = -1

    def create(self) -> bool:
        """Make the file; return False where there was one before. Raises OSError."""
        try:
            self.fd = os.open(self.place.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:
            if not os.path.lexists(self.place.path):  # sshfs answers EPERM where it exists
                raise
        return self.fd >= 0

    def open(self) -> None:
        """Open the file, and read it as it is now. Raises OSError where there is none, or no file: a link, a FIFO."""
        self.close()
        path = self.place.path
        self.fd = open_quietly(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        self.clear()
        self.update(parse_record(os.pread(self.fd, 1 << 16, 0)))

    def close(self) -> None:
        """Close the file, and with that give the lock on it back, if that is ours alone."""
        fd, self.fd = self.fd, -1
        close(fd)

    def save(self) -> None:
        """Write it to the open file, in one write. Raises OSError."""
        data = json.dumps(self).encode('utf-8', 'replace') + b'\n'
        if os.pwrite(self.fd, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if os.fstat(self.fd).st_size > len(data):  # to cut off nothing costs as much as all the rest
            os.ftruncate(self.fd, len(data))

    def is_of(self, here: dict[str, str]) -> bool | None:
        """Return whether the run is one of the host `here`, so that the lock tells whether it lives, or None.

        The kernel's boot id decides, whatever the host is called: a container that is started anew has another name.
        With another boot id it is still this machine, after a reboot, if its name and its machine id are the same.
        None is for an empty or a spoilt record: its owner may be about to write it, or, for a minute, a cache of the
        file server shows an old one. After that it is of nobody, but for an empty one from before this host booted:
        that is what a power cut left of ours. Raises OSError.
        """
        if not self:
            status, now = os.fstat(self.fd), time.time()
            if now - status.st_mtime < 60:
                return None
            return status.st_size == 0 and status.st_mtime < now - time.clock_gettime(time.CLOCK_BOOTTIME)
        keys = ('boot',) if self.get('boot') == here['boot'] else ('host', 'machine')
        return all(here[key] and self.get(key) == here[key] for key in keys)


NO_CHILD = -999  # how a child ended whose status others took


class Shim:
    """The shell that waits for the script of a run and writes its status to `exitcode`, and the session that it leads.

    One that is our child wakes us up when it ends, and tells us its status even where a full disk kept it from writing.
    """

    def __init__(self, exitcode: str) -> None:
        self.exitcode = exitcode
        self.pid: int | None = None  # which is the id of its session
        self.process: subprocess.Popen[bytes] | None = None  # if it is our child
        self.pidfd = -1  # readable when that has ended
        self.status: int | None = None  # with which that has ended
        self.ended_at = 0.0  # when we saw that
        self.kill_at: float | None = None  # when its session gets KILL, set when it got TERM

    def start(self, command: Sequence[str], out: int, **options: Any) -> None:
        """Start it for a script whose words are `command`, with the folder `out` open and these `options` of Popen.

        Raises OSError.
        """
        here = f'/proc/self/fd/{out}/{os.path.basename(self.exitcode)}'
        self.process = subprocess.Popen(['/bin/sh', '-c', SHIM, 'script', self.exitcode, here, *command],
                                        stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self.pid = self.process.pid
        with contextlib.suppress(AttributeError, OSError):  # before Linux 5.3, or built for that: the interval does
            self.pidfd = os.pidfd_open(self.pid)

    @property
    def runs_for_us(self) -> bool:
        """Whether it is our child and runs, or did when we looked last."""
        return self.process is not None and self.process.returncode is None

    def is_alive(self) -> bool:
        """Return whether it is alive, whoever started it (proc(5), cmdline)."""
        if self.process:
            return self.runs_for_us
        with contextlib.suppress(OSError), open(f'/proc/{self.pid}/cmdline', 'rb') as file:
            name = os.path.basename(os.fsencode(self.exitcode))  # the queue may have been moved
            return name in map(os.path.basename, file.read().split(b'\0'))
        return False

    def exit_code(self) -> int | None:
        """Return the exit status of the script as the shim wrote it, or None. Raises OSError.

        An empty file is none: the shim makes the file and then writes to it.
        """
        with contextlib.suppress(FileNotFoundError), open(self.exitcode, 'rb', 0) as file:
            text = file.read(8)
            return int(text) if re.fullmatch(rb'[0-9]{1,3}', text) else None
        return None

    def reap(self) -> int | None:
        """Return how it ended, if it is our child and just did: its status, or -N if signal N killed it; else None.

        What is left then of a session that got TERM is killed first, as long as its id is certainly its own. Of a
        script whose shim was killed we know no more than of one that we found: it may live. Nor do we where others took
        its status (SIGCHLD is ignored, os.wait): then it is NO_CHILD.
        """
        if self.process is None or not self.runs_for_us:
            return None
        code = NO_CHILD
        with contextlib.suppress(ChildProcessError):
            # Without WNOWAIT nothing would keep its pid. And Popen takes the status of who is no child of ours for 0.
            if not os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return None
            if self.kill_at is not None:
                self.kill()
            code = self.process.wait()
        close(self.pidfd)
        if code >= 0:
            self.status, self.ended_at = code, time.monotonic()
        else:
            self.process = None
        return code

    def signal(self, signum: int) -> bool:
        """Send a signal to its session, if it can be waited for, so that the session is still its own.

        Returns whether anything was alive there.
        """
        groups = session_groups(self.pid) if self.pid and self.is_alive() else set()
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # a group that is all sudo(8)'s
                os.killpg(group, signum)
        return bool(groups)

    def kill(self) -> None:
        """Send its session KILL, and wait for its end: what it held is not for the next script before that."""
        deadline = time.monotonic() + 0.5
        while self.signal(signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.001)

    def was_killed_alone(self) -> bool:
        """Return whether it is gone while its script lives on, of which nobody will know how it ends."""
        return self.pid is not None and not self.is_alive() and bool(session_groups(self.pid, dying=False))


RUNS, ENDED, ELSEWHERE, LOST = 'running', 'ended', 'elsewhere', 'lost'


class Run:
    """A script in running/: one that this poller started, or one that it found there."""

    def __init__(self, queue: Queue, name: str) -> None:
        self.queue, self.name = queue, name
        self.path = f'{queue.running}/{name}'
        self.record = Record(self.out('json'))
        self.held: Sequence[Any] = ()  # the resources that we hold for it
        self.shim = Shim(self.out('exitcode'))
        self.is_new = False  # whether we started it, and did not log that yet
        self.code: int | None = None  # its exit status, when its `state` was asked for last

    def __repr__(self) -> str:
        return f'<Run {self.path} of {self.script}, pid {self.record.get("pid")}, holds {self.held}>'

    @property
    def script(self) -> str:
        """The name it had in to_run, and will have if it goes back there."""
        return str(self.record.get('script', self.name))

    @property
    def ids(self) -> Sequence[Any]:
        """The resources that it has or had, by its record."""
        return list(self.record.get('ids', '?'))

    def out(self, kind: str) -> str:
        """Return its file of that `kind` in out/."""
        return f'{self.queue.out}/{self.name}.{kind}'

    # Its beginning.

    def reserve(self) -> bool:
        """Make its record; return False where its name is another run's. Raises OSError, FastgpuError if it is long."""
        too_long = len(os.fsencode(self.name + '.exitcode')) - 255  # NAME_MAX of all file systems of Linux
        if too_long > 0:
            raise FastgpuError(f'its name is too long, by {too_long} bytes')
        folders = [f'{folder}/{self.name}' for folder in (self.queue.running, self.queue.complete, self.queue.fail)]
        files = [self.out(kind) for kind in ('stdout', 'stderr', 'exitcode')]
        return not any(map(os.path.lexists, folders + files)) and self.record.create()


    def unclaim(self) -> None:
        """Undo the claim of a run that was never started, so that nothing of it is left. Raises OSError."""
        try:
            with contextlib.suppress(FileNotFoundError):
                safe_rename(self.path, self.queue.to_run, self.script)
            for kind in ('stdout', 'stderr', 'json'):  # after that: they tell whether it was started
                Path(self.out(kind)).unlink(missing_ok=True)
        finally:
            self.record.close()

    def launch(self, command: Sequence[str], locks: Iterable[int], environment: dict[str, str]) -> None:
        """Start `command` under a shim that inherits our files `locks`. Raises OSError where that fails.

        Its record is opened once more, with a lock of its own that only the shim and the script have: it tells us
        whether something of them is left.
        """
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        files: list[int] = []
        try:
            for path, flags in ((self.record.place.path, os.O_RDWR), (self.queue.out, os.O_PATH | os.O_DIRECTORY),
                                (self.out('stdout'), append), (self.out('stderr'), append)):
                files.append(os.open(path, flags, 0o666))
            own, out, stdout, stderr = files
            self.record.place.asking.lock(own)
            self.shim.start(command, out, stdout=stdout, stderr=stderr, env=environment,
                            pass_fds=(self.record.fd, own, out, *locks))
        finally:
            for fd in files:
                close(fd)  # which cannot fail: by then it has started
        self.is_new = True
        self.mark('pid', self.shim.pid)

    # Its end.

    def age(self) -> float:
        """Return the seconds since it ended, by one clock: ours for our child, else that of its files."""
        if self.shim.process:
            return time.monotonic() - self.shim.ended_at
        with contextlib.suppress(FileNotFoundError):
            finished = os.stat(self.out('exitcode')).st_mtime
            return self.queue.clock(time.time()) - finished
        return 0.0

    def state(self) -> str:
        """Return whether it RUNS or has ENDED here, runs ELSEWHERE, or is LOST, without a record. Raises OSError.

        Notes its exit `code`, but for one of ours that runs. A run that is not ours has ended when nobody locks its
        record any more. Where a daemon that it left behind still does, or where somebody replaced the record by a copy,
        its exit status and its shim tell.
        """
        if self.shim.runs_for_us:
            return RUNS
        self.code = self.shim.exit_code()
        if self.shim.process:
            return ENDED
        try:
            self.record.open()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ESPIPE):  # a link, a folder, a FIFO
                return LOST
            raise
        ours = self.record.is_of(self.queue.here)
        if ours is None:
            return RUNS
        if not ours:
            return ELSEWHERE if self.record else LOST
        same = all(self.record.get(key) == self.queue.here[key] for key in ('boot', 'pids'))
        self.shim.pid = self.record.get('pid') if same else None
        if self.record.place.locked(self.record.fd):
            return ENDED if self.age() > OVERDUE else RUNS
        self.code = self.shim.exit_code()  # once more: the shim had written it before it let go of the lock
        # A script can have closed what it inherited, and its shim be killed alone.
        alive = self.code is None and (self.shim.is_alive() or self.shim.was_killed_alone())
        return RUNS if alive else ENDED

    def is_taken_out(self) -> bool:
        """Return whether it is certainly no longer in running/: not if the folder is gone too, or cannot be read."""
        try:
            os.lstat(self.path)
        except OSError as error:
            return isinstance(error, FileNotFoundError) and os.path.isdir(self.queue.running)
        return False

    def mark(self, word: str, value: Any = True) -> None:
        """Set a word in its record for who settles it: its `pid`, or that it was `stopped`, say, or lost its shim."""
        self.record[word] = value
        with contextlib.suppress(OSError):  # a full disk: while we live, we know it
            self.record.save()

    def terminate(self, why: str) -> None:
        """End it by TERM, and KILL after the grace period; its record says `why`."""
        self.mark(why)  # first: whoever settles it then knows
        self.shim.kill_at = time.monotonic() + GRACE
        self.shim.signal(signal.SIGTERM)

    def was_started(self) -> bool:
        """Return whether its script was, by what it wrote where its poller died before it wrote a pid to the record."""
        if self.shim.status == NOT_STARTED and last_line(self.out('stderr')) == NO_PROCESS:
            return False
        return ('pid' in self.record or os.path.lexists(self.out('exitcode'))
                or self.record.get('boot') != self.queue.here['boot']  # its pid may not have reached the file server
                or any(os.path.exists(file) and os.stat(file).st_size > 0
                       for file in (self.out('stdout'), self.out('stderr'))))

    def seconds(self, since: float = 0) -> float:
        """Return how long it ran, counted from the time `since` at the earliest. To be asked when it is settled."""
        finished: float = self.record.get('finished', 0.0)
        started: float = self.record.get('started', finished)
        return max(0.0, finished - max(since, started))

    def settle(self) -> tuple[str, str]:
        """Move it, if it has ended and its record is ours, to complete, fail or to_run, by its exit `code`.

        Each step can be repeated: a crash between two leaves what the next settle completes. Returns the folder it
        is in now, or 'cancelled', and what there is to say of it. Raises OSError, say for a full disk.
        """
        name, record, queue = self.name, self.record, self.queue
        if self.code is None and not self.was_started():
            self.unclaim()
            return 'to_run', f'requeue {name} (was not started)'
        if self.code is None and self.shim.status is not None:
            Path(self.out('exitcode')).write_text(str(self.shim.status))
            self.code = self.shim.status
        if 'finished' not in record:  # by the clock of this host, as when it started
            record.update(finished=round(time.time() - self.age(), 3), exitcode=self.code)
            record.save()
        folder, how = self.verdict()
        how = f'({how}, {duration(self.seconds())})'
        if not os.path.lexists(self.path):  # cancelled by a person, or collected by another poller
            if record.get('cancelled'):
                return 'cancelled', f'cancelled {name} {how}'
            ours = ('fail', 'complete') if self.shim.status is not None else ()
            return next((folder for folder in ours if os.path.lexists(queue.path / folder / self.name)), ''), ''
        path = safe_rename(self.path, queue.path / folder, self.script if folder == 'to_run' else None)
        text = 'requeue' if folder == 'to_run' else folder
        text += f' {name}' + f' as {path.name}' * (path.name != self.name) + f' {how}'
        if folder == 'fail':
            reason = first_line_trouble(path, self.code) or last_line(self.out('stderr'))
            text += f': {remark(reason, self.out("stderr"))}'
        return folder, text

    def verdict(self) -> tuple[str, str]:
        """Return the folder where it belongs, and how it ended, in a few words."""
        stopped = self.record.get('stopped')
        if self.code is not None:
            return 'complete' if self.code == 0 else 'to_run' if stopped else 'fail', describe(self.code)
        if os.path.lexists(self.out('exitcode')):  # an empty file is all that the shim could write
            return 'to_run' if stopped else 'fail', 'status unknown, the disk was full'
        if len(os.fsencode(self.script)) > 255:  # an edited record
            return 'fail', 'cut off, and its record has a name that no file can have'
        if stopped or self.record.get('cancelled'):
            return 'to_run', 'killed'
        if self.record.get('shim_killed'):
            return 'fail', 'status unknown, the shell that waits for it was killed'
        return 'to_run', describe(None)


# --- Pools: which resources there are, and who has them ---------------------------------------------------------------

class Claims:
    """What we hold of the resources of a `pool`, what we keep for a script that needs several, and what we wait for."""

    def __init__(self, pool: ResourcePoolBase) -> None:
        self.pool = pool
        self.locks: dict[Hashable, int] = {}  # the resources that we hold, and the files that hold them
        self.kept: list[Any] = []  # what we hold for a script that needs more
        self._wanting = ''  # that script
        self.ask_at: dict[str, float] = {}  # when to ask again, by lock file, about what nobody has and is not free
        self._free_since: dict[Hashable, float] = {}  # what is left to who has waited longer, and since when it is
        self._lines: dict[tuple[str, int], Line] = {}  # in which we wait, by lock file and base
        self._left_at: dict[str, float] = {}  # when we gave back what is in a lock file

    def unlock(self, *ids: Any) -> None:
        """Give the locks of `ids` back, also if a daemon that a script left behind still has their files open."""
        for ident in self.locks.keys() & ids:
            with contextlib.suppress(OSError):  # a file server that is away: to close it does for us
                self.pool.place(ident).unlock(self.locks[ident])
        self.drop(*ids)

    def drop(self, *ids: Any) -> None:
        """Close our files of the locks of `ids`: whoever inherited them, if anybody did, still holds them."""
        for ident in self.locks.keys() & ids:
            close(self.locks.pop(ident))
            path = self.pool.place(ident).path
            self._line(path).leave()  # to wait for it anew, behind all who do
            self.ask_at.pop(path, None)  # perhaps that is all that the next script needs
            self._left_at[path] = time.monotonic()

    def lend(self, *ids: Any) -> list[int]:
        """Return the files that hold `ids`, for a script to inherit. Raises FastgpuError if one cannot be locked."""
        for ident in ids:
            if ident not in self.locks and not self.take(ident):
                reason = self.pool.reasons.get(ident) or 'busy'
                raise FastgpuError(f'{self.pool.kind} {self.pool.label(ident)} {reason}')
        return [self.locks[ident] for ident in ids]

    def sign(self, ids: Iterable[Any], what: str, pid: int | None, more: str = '') -> None:
        """Write into the lock files of `ids`, which we hold, what they are held for, for whoever waits for them."""
        for ident in ids:
            who = f'{user_name(os.getuid())} (pid {pid}, {self.pool.path})'
            self.pool.place(ident).write_note(self.locks[ident], f'{what} of {who}{more}')

    def left(self) -> list[Any]:
        """Return the resources that we do not hold, in order of preference."""
        return [ident for ident in self.pool.all_ids() if ident not in self.locks]

    def take_some(self, number: int, script: str = '') -> list[Any]:
        """Lock so many of the resources that are available, on as many lock files; all of them or none.

        Where there are not, we wait in line for them: to be called again and again for the same `script`, until
        `leave`. Who waits longest of those who need several, keeps what it gets: so none is starved by a stream of
        small scripts, and no two who each hold a part wait for each other. What nobody has and was not available is
        asked about once a second.
        """
        if script != self._wanting:
            self.leave([SEVERAL])
            self._wanting = script
        keep = number > 1 and self._is_first(number)
        if not keep:
            self._give_back()
        left = self.left()
        while len(self.kept) < number and left and (keep or len(self.kept) + len(left) >= number):
            ident = left.pop(0)
            if self.pool.place(ident).path not in self.pool.files(self.kept) and self.take(ident, ask=True):
                self.kept.append(ident)
        if len(self.kept) == number:
            ids, self.kept = [ident for ident in self.pool.all_ids() if ident in self.kept], []
            self.pool.reasons.update(dict.fromkeys(ids, ''))
            self.leave([SEVERAL])
            return ids
        if not keep:
            self._give_back()
        # Not for what we hold: when that is given back, we go behind all others.
        for path in self.pool.files(self.left()):
            self._line(path).join(time.monotonic_ns())
        self.sign(self.kept, f'kept for {script}', os.getpid(), f', which needs {number}')
        self.pool.reasons.update(dict.fromkeys(self.kept, f'kept for {script}, which needs {number}'))
        return []

    def leave(self, bases: Sequence[int] = (WAITING, SEVERAL)) -> None:
        """Wait no longer, in the lines with these `bases`, and keep nothing."""
        self._give_back()
        self._wanting = ''
        for line in self._lines.values():
            if line.base in bases:
                line.leave()

    def take(self, ident: Any, ask: bool = False) -> bool:
        """Lock `ident` if nobody has it; `ask` whether it is available, which one poller at a time may do.

        Then, what others have waited for longer than we is left to each of them, for as long as he needs to see it. Who
        does not take what is free waits from then on behind all others.
        """
        place, reasons, fd, now = self.pool.place(ident), self.pool.reasons, -1, time.monotonic()
        line = self._line(place.path)
        try:
            fd = open_lock(place.path)
            who = place.holder(fd)
            if who:
                reasons[ident] = f'busy: {who}'
                self._free_since.pop(ident, None)
            elif ask and now < self.ask_at.get(place.path, 0):
                line.leave()  # what was the reason then is still the reason
            elif ask and now < self._free_since.setdefault(ident, now) + STEP_BACK * line.before_us(fd):
                return False
            elif place.asking.lock(fd):
                line.leave()  # it is our turn, whatever becomes of it
                self._free_since.pop(ident, None)
                reasons[ident] = ''
                if ask and not self.pool.is_available(ident):
                    self.ask_at[place.path] = time.monotonic() + LOOK_AROUND
                elif place.lock(fd):
                    self.locks[ident] = fd
                    self.sign([ident], f'starts {self._wanting}' if self._wanting else 'a lock', os.getpid())
                    place.asking.unlock(fd)
            elif ask and now > self._free_since[ident] + OVERDUE:
                reasons[ident] = f'busy: another poller asks the driver, without an answer (fuser -v {place.path})'
        except OSError as error:
            reasons[ident] = f'unusable: {explain(error)}'
        finally:
            if self.locks.get(ident) != fd:
                close(fd)
        return ident in self.locks

    def usable(self) -> set[str]:
        """Return the lock files of what can be used now, or when it is free, as far as we know."""
        reasons = self.pool.reasons
        return self.pool.files(ident for ident in self.pool.all_ids()
                               if not reasons.get(ident, '').startswith(('unusable', 'busy: rests')))

    def was_left_just_now(self, ident: Any) -> bool:
        """Return whether a script of ours ended there so short a time ago that its memory may still be in use."""
        return time.monotonic() < self._left_at.get(self.pool.place(ident).path, -LINGER) + LINGER

    def _give_back(self) -> None:
        """Give back what is kept for a script. What of it is free is not asked about again at once."""
        while self.kept:
            ident = self.kept.pop()
            self.unlock(ident)
            self.pool.reasons[ident] = ''
            self.ask_at[self.pool.place(ident).path] = time.monotonic() + LOOK_AROUND

    def _is_first(self, number: int) -> bool:
        """Wait in line with those who need several; return whether nobody has waited longer for what we could use."""
        now = time.monotonic_ns()  # the same for all: so whoever came first is first everywhere
        lines = [self._line(path, SEVERAL) for path in sorted(self.pool.files(self.pool.all_ids()))]
        for line in lines:
            line.join(now)
        joined = [line for line in lines if line.since]
        return min(len(joined), len(self.usable())) >= number and not any(line.before_us(line.fd) for line in joined)

    def _line(self, path: str, base: int = WAITING) -> Line:
        """Return the line of those who wait at a lock file, or with SEVERAL of those who need more than that."""
        return self._lines.setdefault((path, base), Line(path, base))


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
        close(fd)
        self.queue = Queue(path, only_look)
        self.path = self.queue.path
        self.wrapper: list[str] = []  # words to put in front of each script's path
        self.reasons: dict[Hashable, str] = {}  # why a resource was not free, or '', when we looked last
        self.between: Callable[[], None] = lambda: None  # what to do between two questions that can take seconds
        self.completed: list[str] = []  # the runs that were collected since `poll_scripts` was called last, by name
        self.failed: list[str] = []
        self.cancelled: list[str] = []
        self.claims = Claims(self)
        self.poller = Poller(self)

    # What a resource is: for a subclass to say.

    def all_ids(self) -> Iterable[Any]:
        """Return the resources, in order of preference."""
        raise NotImplementedError

    def is_available(self, ident: Any) -> bool:
        """Return whether `ident` can take a script.

        A subclass adds its own test to `super().is_available(ident)`. Before a script starts it is asked while nobody
        else can ask, so what it finds cannot be changed by another poller.
        """
        if ident in self.claims.locks:
            return False
        self.reasons[ident] = self.place(ident).why_locked()
        return not self.reasons[ident]

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return the variables that a script on `ids` (mostly one) gets in addition to those of the poller."""
        return {'FASTGPU_ID': ','.join(map(str, ids))}

    def label(self, ident: Any) -> str:
        """Return what people call a resource."""
        return str(ident)

    def demand(self, script: StrPath) -> int:
        """Return how many resources `script` needs at once."""
        return 1

    def place(self, ident: Any) -> Place:
        """Return where the lock of `ident` is: in a file here in the queue, one per host, since the locks are."""
        name = f'.{self.queue.host}-{ident}.lock'.replace('/', '_')
        return Place(f'{self.path}/{name}')

    # Who has it.

    def files(self, ids: Iterable[Any]) -> set[str]:
        """Return the lock files of `ids`."""
        return {self.place(ident).path for ident in ids}

    def lock(self, ident: Any) -> bool:
        """Take the lock of `ident`; return whether we got it. It is ours until `unlock`, or until we end."""
        return ident not in self.claims.locks and self.claims.take(ident)

    def unlock(self, *ids: Any) -> None:
        """Give the locks of `ids` back."""
        self.claims.unlock(*ids)

    def find_next(self) -> Any:
        """Return the first resource that is available, or None."""
        return next((ident for ident in self.all_ids() if self.is_available(ident)), None)

    def lock_next(self) -> Any:
        """Lock the first resource that is available; return it, or None where there is none, to be called again.

        Until it got one it has a place in the line of those who wait.
        """
        self.claims.ask_at.clear()
        ident = next(iter(self.claims.take_some(1)), None)
        if ident is not None:
            self.claims.leave()
        return ident

    def note_end(self, ids: Iterable[Any], name: str, failed_at_once: bool, left_something: bool) -> None:
        """Note that the script `name` ended on `ids`, for what rests after some."""

    def look(self, ident: Any) -> dict[str, Any]:
        """Return the `state` of a resource, free, busy or unusable, and the `reason` where it is not free."""
        if self.is_available(ident):
            return {'state': 'free', 'reason': None}
        state, _, reason = (self.reasons.get(ident) or 'busy').partition(': ')
        if reason.startswith('runs '):
            reason += f' for {duration(time.time() - os.stat(self.place(ident).path).st_mtime)}'
        return {'state': state, 'reason': reason}

    # Running scripts on them.

    def run(self, script: StrPath, *ids: Any) -> bool:
        """Move `script` from to_run to running and start it on `ids` (mostly one), which are locked if they were not.

        Returns at once: whether it started, or was no longer there. `poll_scripts` collects it when it has ended.
        Raises FastgpuError where the script can never run, OSError where the machine cannot start it now; it is in
        to_run then.
        """
        return self.poller.run(script, ids)

    def poll_scripts(self, poll_interval: float = 0.1, exit_when_empty: bool = True) -> int:
        """Run the scripts of to_run, each on a resource of its own, and collect them when they have ended.

        Looks every `poll_interval` seconds, and at the moment a script ends. With `exit_when_empty` it returns when
        nothing is left to run and nothing of this queue runs on this host; else it goes on until it is stopped by
        `interrupt`. What runs at an exception goes on, and is collected by the next call or the next poller.

        Returns 0 if all ended well, 1 if a script failed or was left in to_run, 128+N if it was stopped by signal N.
        Raises OSError where the queue cannot be read, FastgpuError where there are no locks.
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


# --- GPUs: what the driver says of them, and which of them nobody uses ----------------------------------------------

class NoGpus(FastgpuError):
    """There are none here that could be used."""


class GpuError(Exception):
    """Why a GPU cannot be used, in the driver's words."""


class DriverError(GpuError):
    """Why none of them can be."""


class Gpu:
    """A GPU, or an instance of one in MIG mode. Where `error` is not empty, it cannot be used."""

    def __init__(self, index: int, uuid: str = '', model: str = '', parent: str = '', error: str = '') -> None:
        self.index, self.uuid, self.model, self.parent, self.error = index, uuid, model, parent, error
        self.ident: Any = index  # what CUDA is told, and people
        self.old_name = ''  # MIG-GPU-UUID/3/0, of an instance
        self.lock = ''  # the file of its lock
        self.is_numa: bool | None = None  # whether its memory is a node of the machine's, where the driver was asked
        self.failed: list[str] = []  # the last scripts in a row that failed at once on it
        self.next_rest = 60.0  # how many seconds it rests after three of them

    def __repr__(self) -> str:
        return f'<Gpu {self.index} {self.uuid or self.error}>'

    def is_called(self, entry: str) -> bool:
        """Return whether it is meant by an `entry` of CUDA_VISIBLE_DEVICES: its number, or the beginning of a UUID.

        Both can be those of the GPU that it is an instance of.
        """
        if re.fullmatch('[0-9]{1,9}', entry):
            return self.index == int(entry)
        is_uuid = re.match('GPU-|MIG-|[0-9a-f]{8}-', entry)  # of Jetsons without the GPU-
        return bool(is_uuid) and (entry == self.old_name or any(
            uuid.startswith(entry) for uuid in (self.uuid, self.parent)))


class Usage(NamedTuple):
    """What a driver says of a GPU. Memory is in MiB, and None where it is not told."""
    used: float | None  # not told where it is the machine's own, and of no use where that keeps what processes left
    total: float | None
    compute: dict[int, float | None] | None  # the processes that compute, and the memory of each
    graphics: dict[int, float | None]
    mode: str  # its compute mode: Default, Exclusive_Process, Prohibited
    action: str  # what would make it usable again, such as a reset, or ''


UPGRADED = 'the NVIDIA driver was upgraded: reboot, or restart fastgpu_poll once nvidia-smi works'
ACTIONS = {1: 'reset', 2: 'reboot', 4: 'drain and reset', 6: 'bus reset', 7: 'system reboot'}  # nvml.h, field 230


class Nvml:
    """The driver, by way of nvidia-ml-py. Raises ImportError without it."""

    def __init__(self) -> None:
        with warnings.catch_warnings():  # the old package pynvml, which may be here too, has one for its users
            warnings.simplefilter('ignore')
            import pynvml  # here, because a pool of another kind needs none
        if not (hasattr(pynvml, 'nvmlDeviceGetComputeRunningProcesses_v2') and hasattr(pynvml, 'nvmlMemory_v2')):
            raise ImportError('the module pynvml is too old')
        self._nvml: Any = pynvml
        self._up = False

    @functools.cached_property  # when it has been loaded
    def _library(self) -> tuple[str, int]:
        """The path and the inode of the driver's library as this process has loaded it (proc(5), maps), or ''."""
        with open('/proc/self/maps') as maps:
            found = re.search(r'(\d+) +(/.*/libnvidia-ml\.so\S*)', maps.read())
        return (found[2], int(found[1])) if found else ('', 0)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Ask about one GPU, in a `with` block. Raises DriverError if the driver is gone, else GpuError.

        A driver that comes back has to be initialised again, and its old handles mean nothing then: so none is kept.
        """
        nvml = self._nvml
        try:
            if not self._up:
                nvml.nvmlInit()
            self._up = True
            yield
        except nvml.NVMLError as error:
            if self._up and error.value not in (nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                                                nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH):
                raise GpuError(str(error)) from None
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
            self._up = False
            raise DriverError(str(error)) from None

    def _handle(self, gpu: Gpu) -> Any:
        """Return the handle of a GPU: by its number where, because another one is lost, its UUID is not found."""
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_GpuIsLost):
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            if nvml.nvmlDeviceGetUUID(handle) != gpu.uuid:
                raise
            return handle

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, in NVML's order, those in MIG mode as their instances. Raises GpuError."""
        with self._asking():
            number = self._nvml.nvmlDeviceGetCount()
        found = []
        for index in range(number):
            try:
                with self._asking():
                    found += self._devices(index)
            except GpuError as error:
                found.append(Gpu(index, error=str(error)))
        return found

    def _name(self, handle: Any) -> tuple[str, str]:
        """Return the UUID and the model, which is for people only, of a GPU or an instance."""
        uuid = str(self._nvml.nvmlDeviceGetUUID(handle))
        with contextlib.suppress(self._nvml.NVMLError):
            return uuid, str(self._nvml.nvmlDeviceGetName(handle))
        return uuid, ''

    def _devices(self, index: int) -> list[Gpu]:
        """Return a GPU, or if it is in MIG mode its instances, as far as we may use them. Raises NVMLError."""
        nvml, found, current = self._nvml, [], 0
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu = Gpu(index, *self._name(handle))
        with contextlib.suppress(nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            current, _ = nvml.nvmlDeviceGetMigMode(handle)  # not of most cards, nor of drivers before 450
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return [gpu]
        gpu.error = 'is in MIG mode and has no instances (see nvidia-smi mig)'
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):  # a capacity, with gaps
            with contextlib.suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument,
                                     nvml.NVMLError_NoPermission):
                each = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                found.append(Gpu(index, *self._name(each), gpu.uuid))
                with contextlib.suppress(nvml.NVMLError):
                    ids = nvml.nvmlDeviceGetGpuInstanceId(each), nvml.nvmlDeviceGetComputeInstanceId(each)
                    found[-1].old_name = 'MIG-{}/{}/{}'.format(gpu.uuid, *ids)
        return found or [gpu]

    def usage(self, gpu: Gpu, between: Callable[[], None]) -> Usage:
        """Return what the driver says of a GPU now; calls `between` before each question. Raises GpuError."""
        path, inode = self._library
        if path and file_mark(path)[:1] != (inode,):
            raise DriverError(UPGRADED)
        nvml = self._nvml
        with self._asking():
            ask = functools.partial(self._ask, self._handle(gpu), between)
            # The old one is for drivers before 510, where what the driver reserves counts as used.
            memory = ask(lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2),
                         nvml.nvmlDeviceGetMemoryInfo)
            # Not the functions without a version: they refuse to work on drivers before 510.
            compute = ask(nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2)
            mode = ask(nvml.nvmlDeviceGetComputeMode, needed=False)
            field = ask(lambda handle: nvml.nvmlDeviceGetFieldValues(handle, [230])[0], needed=False)
            if gpu.is_numa is None:
                gpu.is_numa = ask(nvml.nvmlDeviceGetNumaNodeId, needed=False) is not None
            graphics = None  # of interest only where something computes, or tells its memory because the GPU does not
            if compute or memory is None or gpu.is_numa:
                graphics = ask(nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, needed=False)
        return Usage(used=None if gpu.is_numa or memory is None else memory.used / 2**20,
                     total=memory and memory.total / 2**20,
                     compute=None if compute is None else self._memory(compute), graphics=self._memory(graphics or []),
                     mode={1: 'Exclusive_Process', 2: 'Prohibited', 3: 'Exclusive_Process'}.get(mode, 'Default'),
                     action='' if field is None or field.nvmlReturn else ACTIONS.get(field.value.uiVal, ''))

    def _ask(self, handle: Any, between: Callable[[], None], question: Callable[[Any], Any],
             older: Callable[[Any], Any] | None = None, needed: bool = True) -> Any:
        """Return the answer to a question, or to an `older` one where the driver does not know that; None for none.

        Raises NVMLError, but not where a question that is not `needed` is unknown.
        """
        nvml = self._nvml
        between()
        try:
            return question(handle)
        except nvml.NVMLError_NotSupported:
            return None
        except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission, nvml.NVMLError_InvalidArgument):
            if older:
                return self._ask(handle, between, older)
            if needed:
                raise
            return None

    def _memory(self, processes: list[Any]) -> dict[int, float | None]:
        """Return the memory of processes in MiB, by pid."""
        return {process.pid: process.usedGpuMemory and process.usedGpuMemory / 2**20 for process in processes}


class NvidiaSmi:
    """The driver, by way of the command nvidia-smi: slower, and without MIG. Raises DriverError where there is none."""

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, in the order of nvidia-smi. Raises DriverError."""
        root, found = self._ask(), []
        for index, each in enumerate(root.iter('gpu')):
            found.append(Gpu(index, each.findtext('uuid', ''), each.findtext('product_name', '')))
            if each.findtext('mig_mode/current_mig') == 'Enabled':
                found[-1].error = 'is in MIG mode, for which this needs nvidia-ml-py (pip install nvidia-ml-py)'
        number = int(root.findtext('attached_gpus') or 0)
        return found + [Gpu(index, error='nvidia-smi cannot reach it') for index in range(len(found), number)]

    def usage(self, gpu: Gpu, between: Callable[[], None]) -> Usage:
        """Return what nvidia-smi says of a GPU now. Raises GpuError."""
        seen = self._ask('-i', gpu.uuid).find('gpu')
        if seen is None:
            raise GpuError('nvidia-smi cannot reach it')
        kinds: dict[str, dict[int, float | None]] = {'C': {}, 'G': {}}
        for process in seen.iter('process_info'):
            pid = process.findtext('pid', '')
            if not pid.isdecimal():
                raise GpuError(f'nvidia-smi tells a process as {pid}')
            for kind in set(process.findtext('type', 'C')) & set(kinds) or 'C':
                kinds[kind][int(pid)] = mebibytes(process.findtext('used_memory'))
        are_told = 'N/A' not in seen.findtext('processes', 'N/A')
        action = seen.findtext('gpu_recovery_action', '').lower()
        return Usage(used=mebibytes(seen.findtext('fb_memory_usage/used')),
                     total=mebibytes(seen.findtext('fb_memory_usage/total')),
                     compute=kinds['C'] if are_told else None, graphics=kinds['G'],
                     mode=seen.findtext('compute_mode', 'Default'),
                     action=action if re.search('reset|reboot', action) else '')

    def _ask(self, *args: str) -> Any:
        """Return the XML that `nvidia-smi -q -x` answers, see nvidia-smi(1).

        Raises DriverError with what it says instead; with `args`, which ask for one GPU, GpuError where it says that of
        this GPU only.
        """
        from xml.etree import ElementTree  # here, because few need it
        try:
            # In a session of its own, so that Ctrl-C in our terminal is not for it.
            run = subprocess.run(['nvidia-smi', '-q', '-x', *args], stdin=subprocess.DEVNULL, capture_output=True,
                                 text=True, errors='replace', timeout=30, start_new_session=True)
        except OSError as error:
            raise DriverError(f'nvidia-smi: {error.strerror}') from None
        except subprocess.TimeoutExpired:
            raise DriverError('nvidia-smi does not answer') from None
        # What it says of a GPU that it cannot reach can stand before and behind that.
        match = re.search('<nvidia_smi_log>.*</nvidia_smi_log>', run.stdout, re.S)
        if match and run.returncode in (0, 14):  # 14 is a warning about the infoROM
            with contextlib.suppress(ElementTree.ParseError):
                return ElementTree.fromstring(match[0])
        reason = (run.stderr.strip() or run.stdout.strip()).split('\n')[0] or f'nvidia-smi: status {run.returncode}'
        if args:
            self._ask()  # if that works, it is this GPU alone
            raise GpuError(reason)
        raise DriverError(reason)


def mebibytes(text: str | None) -> float | None:
    """Return the MiB in a `text` of nvidia-smi such as `3 MiB`, None for `N/A`."""
    match = re.match('([0-9.]+) MiB', text or '')
    return float(match[1]) if match else None


def find_driver() -> tuple[Nvml | NvidiaSmi, list[Gpu]]:
    """Return the way to ask the driver, and its GPUs. Raises NoGpus where there are none."""
    try:
        driver: Nvml | NvidiaSmi = Nvml()
    except ImportError:
        driver = NvidiaSmi()
        if not shutil.which('nvidia-smi'):
            raise NoGpus('no NVIDIA driver found: install the driver, which brings nvidia-smi, or if it is here '
                         'pip install nvidia-ml-py') from None
        log('asking nvidia-smi, which is slower and knows no MIG: pip install nvidia-ml-py')
    try:
        gpus = driver.gpus()
    except GpuError as error:
        raise NoGpus(f'no NVIDIA driver found ({error})') from None
    if not gpus:
        raise NoGpus('the NVIDIA driver shows no GPU')
    return driver, gpus


def visible_gpus(gpus: list[Gpu], listed: str | None) -> list[Gpu]:
    """Return those of `gpus` that the value `listed` of CUDA_VISIBLE_DEVICES (None: not set) makes visible.

    The grammar is CUDA's (CUDA C++ Programming Guide, "CUDA Environment Variables"): numbers, and UUIDs or unique
    beginnings of them; the first entry that names no GPU ends the list. The number of a GPU in MIG mode stands for
    all its instances. Sets the `ident` of the GPUs it returns: the UUID where a number could mislead CUDA. Raises
    NoGpus where nothing is visible, FastgpuError for what is ambiguous or named twice.
    """
    chosen = gpus if listed is None else []
    entries = [] if listed is None else [entry.strip() for entry in listed.split(',')]
    what = f'CUDA_VISIBLE_DEVICES={listed}'
    for number, entry in enumerate(entries):
        matches = [gpu for gpu in gpus if gpu.is_called(entry)]
        devices = sorted({gpu.uuid if gpu.uuid.startswith(entry) else gpu.parent for gpu in matches})
        if len(devices) > 1 and entry not in devices:
            raise FastgpuError(f'{what}: {entry} could be ' + ' or '.join(devices))
        if any(gpu in chosen for gpu in matches):
            raise FastgpuError(f'{what} names {entry} twice')
        if not matches:
            if number and entries[number:] != ['']:
                log(f'{what}: there is no GPU "{entry}"; it and all behind it are left out, as CUDA does')
            break
        chosen += matches
    if not chosen:
        raise NoGpus(f'{what} hides all GPUs' + f' (there is no GPU "{entries[0]}")' * bool(entries[0]) + '; unset it')
    by_uuid = any(gpu.parent or gpu.error for gpu in gpus) or any('-' in entry[1:] for entry in entries)
    for gpu in chosen:
        gpu.ident = gpu.uuid if by_uuid and gpu.uuid else gpu.index
        if gpu.error:
            log(f'gpu {gpu.index} unusable: {gpu.error}')
    usable = [gpu for gpu in chosen if not gpu.error]
    if not usable:
        raise NoGpus('no GPU is usable: ' + '; '.join(f'gpu {gpu.index}: {gpu.error}' for gpu in chosen))
    return usable


def gpus_wanted(script: StrPath) -> int:
    """Return how many GPUs a script asks for in its #SBATCH lines, 1 where it does not.

    They are those of sbatch(1): --gpus, -G, --gres=gpu and --gpus-per-node, in the comments above the first command.
    Raises FastgpuError where one of them has no number.
    """
    head, wanted = '', {}
    with contextlib.suppress(OSError), open(script, 'rb', 0) as file:
        head = file.read(1 << 16).decode('utf-8', 'replace')
    for line in itertools.takewhile(lambda line: line.startswith('#') or not line.strip(), head.splitlines()):
        asked = re.sub(r'\s#.*', '', line[7:]) if re.match(r'#SBATCH\s', line) else ''
        for option, value in re.findall(r'\s(--gpus-per-node|--gpus|--gres|-G)(?:[=\s]\s*|(?=\d))(\S+)', asked):
            # 2, a100:2; for --gres also gpu, gpu:a100, gpu:a100:2, and what is no GPU
            parts = [part for part in value.split(',') if option != '--gres' or re.match('gpu(:|$)', part)]
            numbers = [part.split(':')[-1] for part in parts]
            if option == '--gres':
                numbers = [number if number.isdecimal() else '1' for number in numbers]
            if not all(re.fullmatch('[0-9]{1,6}', number) for number in numbers):
                raise FastgpuError(f'its line "{line.strip()}" does not say how many GPUs')
            wanted[option] = sum(map(int, numbers))
    return max([1, *wanted.values()])


def memory_text(mib: float) -> str:
    """Return an amount of memory as people read it: `512 MiB`, `23.1 GiB`."""
    return f'{mib:.0f} MiB' if mib < 1024 else f'{mib / 1024:.1f} GiB'


def command_name(pid: int) -> str:
    """Return the name of the command of a process, or '' where that cannot be seen, as in a container (proc(5), comm).
    """
    with contextlib.suppress(OSError), open(f'/proc/{pid}/comm', errors='replace') as file:
        return file.read().strip()
    return ''


def is_mps(pid: int) -> bool:
    """Return whether a process is the server of MPS, which is on its GPUs for ever. A name is cut to 15 characters."""
    return command_name(pid) == 'nvidia-cuda-mps'


def process_text(pid: int) -> str:
    """Return `pid 4121 (python of ann)`, or the pid alone where the rest cannot be seen."""
    with contextlib.suppress(OSError):
        return shown(f'pid {pid} ({command_name(pid)} of {user_name(os.stat(f"/proc/{pid}").st_uid)})')
    return f'pid {pid}'


class ResourcePoolGPU(ResourcePoolBase):
    """Runs scripts on the GPUs of this host, or on those of them that CUDA_VISIBLE_DEVICES lists.

    A GPU is free while nobody holds its lock, no compute process is on it, and at most `max_used` MiB of its memory
    are in use. With `per_gpu` N, up to N scripts share one: each but the first needs 1/N of its memory to be free.
    Desktop programs, which are graphics processes too, and the server of MPS count by their memory alone. Raises
    FastgpuError where there are no GPUs.
    """
    kind = 'gpu'
    rests = True  # whether GPUs do for a while, after scripts that left something running or failed at once

    def __init__(self, path: StrPath, max_used: float = 1024, per_gpu: int = 1, only_look: bool = False) -> None:
        self._driver, gpus = find_driver()
        gpus = visible_gpus(gpus, os.environ.get('CUDA_VISIBLE_DEVICES'))
        folder = os.environ.get('FASTGPU_LOCK_DIR') or '/tmp'
        if not os.path.isabs(folder):
            raise FastgpuError('FASTGPU_LOCK_DIR has to be the same for all: give it an absolute path')
        if not os.path.isdir(folder):
            raise FastgpuError(f'{folder}: there is no such folder for the locks (FASTGPU_LOCK_DIR)')
        for gpu in gpus:
            gpu.lock = os.path.join(folder, f'fastgpu-{gpu.uuid}.lock'.replace('/', '_'))
        super().__init__(path, only_look)  # not before it is clear that there are GPUs: it makes folders
        self.max_used, self.per_gpu = max_used, per_gpu
        self._said: set[str] = set()  # what is said once, such as that the driver is `gone`, until it is back
        self._rests: dict[str, tuple[int, float]] = {}  # the lock of one that rests because of us, and until when
        # The n-th place on GPU 3 is 3 itself, then 3.1, 3.2: first one script on each, then a second.
        self._places = {f'{gpu.ident}.{n}' if n else gpu.ident: (gpu, n) for n in range(per_gpu) for gpu in gpus}

    def all_ids(self) -> list[Any]:
        """Return the GPUs: their numbers, in NVML's order or in that of CUDA_VISIBLE_DEVICES, or UUIDs."""
        return list(self._places)

    def label(self, ident: Any) -> str:
        """Return the number of a GPU, also where its ID is the UUID; for a MIG instance, which has none, that."""
        gpu, number = self._places.get(ident, (None, 0))
        if gpu is None or gpu.parent:
            return str(ident)
        return f'{gpu.index}.{number}' if number else str(gpu.index)

    def demand(self, script: StrPath) -> int:
        """Return how many GPUs the script asks for. Raises FastgpuError for no number, and for more than there are."""
        number = gpus_wanted(script)
        self.check_number(number)
        return number

    def check_number(self, number: int) -> None:
        """Raise FastgpuError where there are not so many GPUs."""
        most = len(self._places) // self.per_gpu
        if number > most:
            raise FastgpuError(f'{number} gpus are needed, and there {"are" if most > 1 else "is"} only {most}')

    def place(self, ident: Any) -> Place:
        """Return where the lock is, in a file that all users of the host share: one place on a GPU, or all of it."""
        gpu, number = self._places[ident]
        return Place(gpu.lock, number, 1) if self.per_gpu > 1 else Place(gpu.lock)

    def environment(self, *ids: Any) -> dict[str, str]:
        """Return FASTGPU_ID and what makes CUDA see these GPUs alone, counted as NVML counts."""
        gpus = ','.join(str(self._places[ident][0].ident) for ident in ids)
        return {'FASTGPU_ID': gpus, 'CUDA_VISIBLE_DEVICES': gpus, 'CUDA_DEVICE_ORDER': 'PCI_BUS_ID'}

    def is_available(self, ident: Any) -> bool:
        """Return whether nobody has the GPU, and the driver says that it is free; if not, `reasons` has the reason."""
        if not super().is_available(ident):
            return False
        gpu = self._places[ident][0]
        self.reasons[ident] = self._why_rests(gpu) if self.rests else ''
        if self.reasons[ident]:
            return False
        try:
            usage = self._driver.usage(gpu, self.between)
            if 'gone' in self._said:
                self._said.remove('gone')
                log('the NVIDIA driver is back')
            self.between()  # for a signal during the last question
            self.reasons[ident] = self._why_busy(gpu, usage)
        except DriverError as error:
            self._say_once('gone', UPGRADED if str(error) == UPGRADED else
                           f'the NVIDIA driver is gone ({error}): nothing starts until it is back')
            self._name_by_uuid()  # it may count them in another way then
            return False
        except GpuError as error:
            self.reasons[ident] = f'unusable: {error}'
            self._name_by_uuid()  # if it is lost, CUDA counts those that are left anew
        return not self.reasons[ident]

    def _why_busy(self, gpu: Gpu, usage: Usage) -> str:
        """Return the reason why no script can start on a GPU on which a place is left, or ''."""
        if usage.action:
            return f'unusable: it needs a {usage.action}'
        if usage.mode == 'Prohibited':
            return 'unusable: its compute mode is Prohibited (sudo nvidia-smi -c 0 mends that)'
        processes = {**usage.graphics, **(usage.compute or {})}
        pids = [pid for pid in usage.compute or () if pid not in usage.graphics and not is_mps(pid)]
        used, total = usage.used, usage.total
        is_shared = self.per_gpu > 1 and bool(Place(gpu.lock).why_locked())  # scripts have other places on it
        if usage.compute is None:
            if used is None:
                return 'busy: it tells neither its memory nor its processes: --workers 1 runs one script at a time'
            self._say_once('pids', f'gpu {gpu.index} does not tell its processes: its memory alone decides')
        if used is None:
            self._say_once('memory', f'gpu {gpu.index} shares the memory of the machine: that of its processes counts')
            untold = [pid for pid, memory in processes.items() if memory is None and (is_shared or pid not in pids)]
            if untold:
                return f'busy: {process_text(untold[0])} does not tell its memory'
            used = sum(memory or 0 for memory in processes.values())
        if total is None:
            total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**20
        if self.per_gpu > 1 and usage.mode == 'Exclusive_Process' and not any(map(is_mps, processes)):
            self._say_once('mode', f'warning: gpu {gpu.index} is in Exclusive_Process mode: that needs MPS for several')
        if is_shared:
            busy = total - used < total / self.per_gpu
            rule = f'; one more script needs {memory_text(total / self.per_gpu)} of {memory_text(total)} free'
        else:
            busy = bool(pids) or used > self.max_used
            rule = '' if pids else f'; free is up to {memory_text(self.max_used)}'
        if not busy:
            return ''
        return f'busy: {memory_text(used)} used by {", ".join(map(process_text, pids)) or "no compute process"}{rule}'

    def note_end(self, ids: Iterable[Any], name: str, failed_at_once: bool, left_something: bool) -> None:
        """Let GPUs rest on which three scripts in a row failed at once, or one left something running.

        They are sick, or what these scripts have in common is: after a minute the next one may try, and when that fails
        at once too the rest is twice as long. What was left running is seen by the driver within 30 s, or never.
        """
        for ident in ids:
            gpu = self._places[ident][0]
            if left_something:
                text = f'{name} left something running: waiting {SHOWS:.0f} s to see whether that uses it'
                self._rest(gpu, SHOWS, text)
            gpu.failed = [*gpu.failed, name][-3:]
            if not failed_at_once:
                gpu.failed, gpu.next_rest = [], 60
            elif len(gpu.failed) == 3 and not self._why_rests(gpu):
                until = time.strftime('%H:%M:%S', time.localtime(time.time() + gpu.next_rest))
                text = f'rests until {until}: {", ".join(gpu.failed)} failed in a row, each within {AT_ONCE:.0f} s'
                self._rest(gpu, gpu.next_rest, f'{text} (see their .stderr in out)')
                gpu.next_rest = min(3600, 2 * gpu.next_rest)
                self.reasons[ident] = self._why_rests(gpu)

    def _rest(self, gpu: Gpu, seconds: float, reason: str) -> None:
        """Let no poller of this queue use a GPU for so many seconds: a lock in it says so, with the `reason`."""
        place = self._rest_place(gpu)
        with contextlib.suppress(OSError):
            fd = open_lock(place.path)
            if place.lock(fd):
                place.write_note(fd, reason)
                self._rests[gpu.uuid] = fd, time.monotonic() + seconds
            else:
                close(fd)

    def _why_rests(self, gpu: Gpu) -> str:
        """Return the reason why a GPU rests, or ''."""
        if time.monotonic() >= self._rests.get(gpu.uuid, (-1, float('inf')))[1]:
            close(self._rests.pop(gpu.uuid)[0])
        return self._rest_place(gpu).why_locked()

    def _rest_place(self, gpu: Gpu) -> Place:
        """Return where the lock of a GPU that rests is."""
        return Place(f'{self.path}/.{self.queue.host}-rest-{os.path.basename(gpu.lock)}')

    def _say_once(self, about: str, text: str) -> None:
        """Log the first `text` about this."""
        if about not in self._said:
            self._said.add(about)
            log(text)


    def _name_by_uuid(self) -> None:
        """Let scripts get the UUIDs of GPUs from now on, where numbers could mislead CUDA."""
        for gpu, _ in self._places.values():
            gpu.ident = gpu.uuid

    def look(self, ident: Any) -> dict[str, Any]:
        """Return whether a GPU is free, why if not, its model and its memory."""
        gpu = self._places[ident][0]
        seen: dict[str, Any] = {'model': gpu.model, 'memory_used': None, 'memory_total': None, **super().look(ident)}
        with contextlib.suppress(GpuError):
            usage = self._driver.usage(gpu, self.between)
            seen.update(memory_used=usage.used and round(usage.used), memory_total=usage.total and round(usage.total))
        return seen


# --- Poller: the loop, from to_run to complete and fail ---------------------------------------------------------------

class Stopped(Exception):
    """A signal came while the driver was asked, which can take seconds: nothing more is started."""


@contextlib.contextmanager
def interrupts_for(note: Callable[[int], None]) -> Iterator[None]:
    """Let Ctrl-C, in a `with` block, only be noted, so that it does the same in a notebook as in the command.

    Not where somebody has a handler of his own for it, nor in a thread, which can have none.
    """
    handler = signal.getsignal(signal.SIGINT)
    ours = handler == signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda signum, frame: note(signum))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


class News:
    """What was last logged about what, so that nothing is said twice."""

    def __init__(self) -> None:
        self._said: dict[Hashable, str] = {}
        self._quiet_until: dict[Hashable, float] = {}  # about what is said with a pause

    def say(self, about: Hashable, text: str, pause: float = 0) -> None:
        """Log `text` unless it is what was last said about this, but for amounts, which always change.

        Nor is something said with a `pause` in so many seconds after the last such. `about` is a resource, a script in
        to_run by its name, a run by its path, or another word with a slash in it.
        """
        gist = re.sub(r'[0-9.]+ ([MG]iB|scripts?)', '', text)
        if self._said.get(about) == gist or (pause and time.monotonic() < self._quiet_until.get(about, 0)):
            return
        self._said[about] = gist
        if pause:
            self._quiet_until[about] = time.monotonic() + pause
        log(text)

    def tell_why(self, pool: ResourcePoolBase, ids: Iterable[Any], where: Callable[[list[Any]], str]) -> None:
        """Say why each of `ids` of the `pool` is not free, once a minute where that is who has it: they come and go."""
        for ident in ids:
            reason = pool.reasons.get(ident)
            if reason and not (' used by ' in reason and pool.claims.was_left_just_now(ident)):
                pause = HUSH if re.match(r'busy: .* of \S+ \(pid', reason) else 0
                self.say((pool.kind, ident), f'{where([ident])} {reason}', pause)

    def forget(self, about: Hashable) -> None:
        """Say what there is to say about this again, when it comes up again."""
        self._said.pop(about, None)


class Pending:
    """What waits in to_run: which script is next, and what cannot start and why."""

    def __init__(self, queue: Queue, news: News) -> None:
        self.queue, self.folder, self.news = queue, queue.to_run, news
        self.names: list[str] = []  # what is left of the last list, backwards
        self.passed: dict[str, str] = {}  # what of that list was passed over, and why
        self._unfit: dict[Hashable, str] = {}  # why a script, as long as it is the same file, can never start
        self._changed = 0  # the time stamp of the folder when it was listed
        self._list_at = 0.0  # when it may be listed again
        self._listed_at = 0.0
        self._held_until = 0.0  # when a script may be started again

    def __bool__(self) -> bool:
        """Whether something waits for a resource, or only for a moment."""
        return bool(self.names) or any(reason in PASSING for reason in self.passed.values())

    def update(self) -> None:
        """List to_run if that is due. Raises OSError.

        To list a long queue takes longer than to start a script of it. So a list serves for six times as long as it
        took to make, and for a second while the folder seems unchanged: its time stamp is too coarse to tell each
        change.
        """
        now = time.monotonic()
        if now >= self._list_at and (self.passed or now > self._listed_at + LOOK_AROUND
                                     or os.stat(self.folder).st_mtime_ns != self._changed):
            self.look()

    def look(self) -> None:
        """List to_run. Raises OSError."""
        self._listed_at = time.monotonic()
        self._changed = os.stat(self.folder).st_mtime_ns
        self.names = names_in(self.folder)[::-1]
        self.passed.clear()
        self._list_at = self._listed_at + 7 * (time.monotonic() - self._listed_at)

    def first(self, ending: Callable[[str], bool]) -> str | None:
        """Return the first script that can start; pass those over that cannot, and say why. Raises OSError.

        That is also one whose last run is only `ending`.
        """
        if not self.names:
            self.update()
        while self.names and time.monotonic() >= self._held_until:
            name = self.names[-1]
            reason = self.condition(name) or ENDING * ending(name)
            if not reason:
                return name
            self.names.pop()
            if reason == IGNORED:
                continue
            self.passed[name] = reason
            if reason not in PASSING:
                what = reason if reason == NOT_EXECUTABLE else f'cannot run: {reason}'
                self.news.say(name, f'{near(self.folder / name)} {what}')
        return None

    def condition(self, name: str) -> str:
        """Return what keeps a script from being run: nothing (''), or the reason in a few words."""
        reason = condition(f'{self.folder}/{name}', self.queue.clock)
        return reason or (self._unfit.get((name, file_mark(self.folder / name)), '') if self._unfit else '')

    def hold(self, name: str, reason: str) -> None:
        """Say that a script cannot be started now, and let none be for a while."""
        self.news.say('/start', f'cannot start {name} now: {reason}; trying again')
        self._held_until = time.monotonic() + LOOK_AROUND

    def pop(self) -> None:
        """Take the first script off the list, since it runs, or is gone."""
        self.news.forget(self.names.pop())

    def refuse(self, name: str, reason: str) -> None:
        """Pass a script over that can never run, until it is another file."""
        self._unfit[name, file_mark(self.folder / name)] = reason

    def left(self) -> dict[str, str]:
        """Return the names of what is in to_run now, each with what keeps it from being run. Raises OSError."""
        return {name: self.condition(name) for name in scripts_in(self.folder)}


class Tally:
    """What one call of `poll_scripts` did: which scripts ended, how, and how long they took."""

    def __init__(self) -> None:
        self.ended: dict[str, list[str]] = {'complete': [], 'fail': [], 'cancelled': []}
        self.began = time.time()
        self.seconds = 0.0  # that the scripts took that are complete
        self.busy_seconds = 0.0  # that resources were used since then, all of them together

    def add(self, run: Run, folder: str) -> None:
        """Count a run that was settled, and is in the `folder` now."""
        if folder in self.ended:
            self.ended[folder].append(run.name)
        if folder == 'complete':
            self.seconds += run.seconds()
        self.busy_seconds += run.seconds(self.began) * len(run.ids)

    def done(self) -> int:
        """Return how many scripts have ended."""
        return sum(map(len, self.ended.values()))

    def progress(self, running: int, waiting: int) -> str:
        """Return in one line how far this is, while so many scripts are `running` and `waiting`."""
        done, complete = self.done(), len(self.ended['complete'])
        failed = f'done ({len(self.ended["fail"])} failed)'
        if not (running or waiting):
            return f'{done} {failed}, waiting for scripts'
        text = f'{done}/{done + running + waiting} {failed}, {running} running'
        if complete and running:
            text += f', about {duration(time_left(self.seconds / complete, waiting, running))} left'
        return text

    def summary(self, kind: str, left: int) -> str:
        """Return in one line what was done on resources of a `kind`, where so many scripts are `left`."""
        times = duration(time.time() - self.began)
        times += f' ({duration(self.busy_seconds)} of {kind} time)' * bool(self.busy_seconds)
        counts = ', '.join(f'{len(names)} {how}' for how, names in self.ended.items() if names or how != 'cancelled')
        return f'{count(self.done(), "script")} in {times}: {counts}' + f', {left} left in to_run' * bool(left)


class Runs(dict[str, Run]):
    """The runs that a poller knows, by name: its own, and those that it found; what has ended of them is collected."""

    def __init__(self, pool: ResourcePoolBase, pending: Pending, signals: list[int], news: News) -> None:
        super().__init__()
        self.pool, self.queue, self.pending, self.signals, self.news = pool, pool.queue, pending, signals, news
        self.tally = Tally()
        self.look_at = 0.0  # when to look around again
        self.left_behind = False  # whether there was one that nobody can collect
        self._cuts: dict[str, int] = {}  # how often a script was cut off under our eyes
        self._collected_at = 0.0
        self.many_hosts = os.environ.get('SLURM_STEP_NUM_NODES', '1') != '1'  # srun(1); or we see another one's run

    def release(self) -> None:
        """Give back what those scripts of ours held that have ended."""
        for run in self.values():
            if run.shim.kill_at is not None and time.monotonic() >= run.shim.kill_at:
                run.shim.kill()
            code = run.shim.reap()
            if code is None:
                continue
            held, run.held = run.held, ()  # from here on they may be another run's
            if code >= 0:
                self.pool.unlock(*held)
                self._cuts.pop(run.script, None)
                if run.record.place.asking.locked(run.record.fd):
                    run.record['left_behind'] = pids_with(run.record.place.path)
                at_once = time.time() - run.record['started'] < AT_ONCE and run.shim.kill_at is None
                self.pool.note_end(held, run.name, at_once and code != 0, 'left_behind' in run.record)
            else:
                # When its locks end is for the kernel, and from here on it is a run that we found. One that kills its
                # own group each time would go round for ever: the second time counts as its end.
                self.pool.claims.drop(*held)
                if run.shim.was_killed_alone():
                    run.mark('shim_killed')
                run.record.close()
                self._cuts[run.script] = self._cuts.get(run.script, 0) + (run.shim.kill_at is None and code != NO_CHILD)
                run.shim.status = 128 - code if self._cuts[run.script] > 1 else None

    def look_around(self) -> None:
        """See to all runs in running/, whoever started them. Raises OSError, also where the queue is not what it was.
        """
        self.queue.check_is_there()
        for name in names_in(self.queue.running):
            self.setdefault(name, Run(self.queue, name))
        self.collect(others=True)
        self.look_at = time.monotonic() + LOOK_AROUND

    def collect(self, others: bool = False) -> None:
        """Collect the runs that have ended, and see to those of `others` and to what a person took out of running/."""
        self._collected_at = time.monotonic()
        for run in list(self.values()):
            if not (run.shim.process or others):
                continue
            if run.is_new:
                run.is_new = False
                log(f'{self.where(run.ids)}: start {run.name}')
            try:
                state = run.state()
                done = self.finish(run) if state == ENDED else others and self.see_to(run, state)
            except OSError as error:
                self.news.say(run.path, f'cannot collect {run.name} now: {explain(error)}; trying again')
                self.queue.mend()
                continue
            if done:
                run.record.close()
                del self[run.name]

    def keep_up(self) -> None:
        """Collect the runs that have ended, if it took long since we did: a driver can take seconds for an answer.

        Raises Stopped where nothing more is to be started.
        """
        if self.signals:
            raise Stopped
        if time.monotonic() > self._collected_at + 0.1:
            self.release()
            self.collect()

    def see_to(self, run: Run, state: str) -> bool:
        """Do for a run in a `state` other than ENDED what it asks for; return whether it is no business of ours.

        Raises OSError.
        """
        if state == RUNS and run.shim.kill_at is None and run.code is None:
            if run.is_taken_out() and run.shim.is_alive():
                log(f'{self.where(run.ids)}: cancel {run.name}, taken out of running')
                run.terminate('cancelled')
            elif not run.shim.process and run.shim.was_killed_alone():
                run.mark('shim_killed')
        self.many_hosts |= state == ELSEWHERE
        busy = self.pending or self.signals or any(run.shim.process for run in self.values())
        if not busy and os.path.lexists(run.path):  # there is nothing to do for us but to wait for it
            self.news.say(run.path, self.advice(run, state))
            self.left_behind |= state == LOST
        return state != RUNS

    def finish(self, run: Run) -> bool:
        """Collect a run that has ended; return whether that is done, else it is to be called again. Raises OSError."""
        age = run.age()
        if not (run.shim.process or run.record.place.lock(run.record.fd) or age > OVERDUE):
            return False  # another poller is about to
        # Slurm, or a box that shuts down, sends TERM to all processes at once, to some of them a moment earlier than to
        # us: what it ended goes back to to_run.
        if (run.code or run.shim.status) and not run.record.keys() & {'cancelled', 'finished'}:
            if self.stopping() and age < 1:
                run.record['stopped'] = True
            elif run.code == 128 + signal.SIGTERM and not self.signals and 0 <= age < 0.5:
                return False  # too early to tell
        folder, text = run.settle()
        if run.code is None and run.shim.status == NOT_STARTED:
            self.pending.hold(run.script, NO_PROCESS)
        if text:
            log(f'{self.where(run.ids)}: {text}', alarm=folder == 'fail')
        if run.shim.process and 'left_behind' in run.record:
            pids = ', '.join(map(str, run.record['left_behind'])) or 'unknown'
            log(f'{self.where(run.ids)}: {run.name} left something running (pid {pids}): let the script `wait` for it')
        if run.shim.process:
            self.news.tell_why(self.pool, run.ids, self.where)  # where it made a GPU rest
        self.tally.add(run, folder)
        return True

    def advice(self, run: Run, state: str) -> str:
        """Return what there is to say of a `run` in a `state`, if it is not ours, to who waits for it."""
        if state == RUNS:
            return f'waiting for {run.name}, which runs without this poller'
        folder = self.queue.to_run if run.code is None else self.queue.fail if run.code else self.queue.complete
        mend = f'mv {shlex.quote(run.path)} {shlex.quote(str(folder))}/'
        if state == LOST:
            return f'{run.path} has no record in out; if nothing runs it: {mend}'
        how = 'runs' if run.code is None else f'ended ({describe(run.code)})'
        return f'{run.name} {how} on {run.record["host"]}; if no fastgpu_poll will run there again: {mend}'

    def is_ending(self, name: str) -> bool:
        """Return whether `name` is of a run that a person moved back to to_run: it starts anew when that has ended."""
        return any(name in (run.name, run.script) and (run.shim.kill_at is not None or run.is_taken_out()
                                                       or is_same(run.path, self.queue.to_run / name))
                   for run in self.values())

    def stopping(self) -> bool:
        """Return whether scripts are to be stopped, not only no more to be started."""
        return bool(self.signals) and self.signals != [signal.SIGINT]

    def where(self, ids: Iterable[Any]) -> str:
        """Return where a run runs, for the log: `gpu 0`, and of which host where several take part."""
        which = ','.join(map(self.pool.label, ids)) or '-'
        return f'{self.queue.host} ' * self.many_hosts + f'{self.pool.kind} {which}'


class Poller:
    """The loop: takes scripts from to_run, each on a resource of its own, to complete and fail."""

    def __init__(self, pool: ResourcePoolBase) -> None:
        self.pool, self.queue = pool, pool.queue
        self.signals: list[int] = []
        self.news = News()
        self.pending = Pending(self.queue, self.news)
        self.runs = Runs(pool, self.pending, self.signals, self.news)
        self.lent: list[Any] = []  # the resources that were locked when `poll_scripts` was called
        self.stop_at = 0.0  # when we began to stop scripts
        self.gone_at = 0.0  # since when the queue is gone
        pool.between = self.runs.keep_up

    def poll_scripts(self, poll_interval: float, exit_when_empty: bool) -> int:
        """Do what `ResourcePoolBase.poll_scripts` says."""
        runs, pending = self.runs, self.pending
        runs.tally = Tally()
        self.pool.completed, self.pool.failed, self.pool.cancelled = runs.tally.ended.values()
        runs.look_at = self.stop_at = 0.0
        self.lent = list(self.pool.claims.locks)
        with self.queue.announced(), interrupts_for(self.signals.append):
            try:
                while not self.turn(exit_when_empty):
                    log.bottom(runs.tally.progress(len(runs), 0 if self.signals else len(pending.names)))
                    self.sleep(poll_interval)
                assert not self.loose(), f'held, and for no script: {self.loose()}'
            except BaseException:
                self.signals.clear()  # they were for this call
                raise
            finally:
                log.bottom('')
                self.pool.claims.leave()
                self.pool.claims.drop(*self.loose())
        return self.sum_up()

    def turn(self, exit_when_empty: bool) -> bool:
        """Do once what there is to do; return whether that was all."""
        done = False
        try:
            self.runs.release()
            done = bool(self.signals) and self.stop()
            if time.monotonic() >= self.runs.look_at:
                self.runs.look_around()
                self.gone_at = 0.0
                self.news.forget('/queue')
            waits = self.start()  # before what has ended is collected: no resource waits for that
            self.runs.collect()
            if waits:
                self.tell_why(*waits)  # behind the lines of what started and ended
            if self.pending.names:
                self.pending.update()  # no resource waits for that now
            done = done or (exit_when_empty and not self.signals and self.is_finished())
        except OSError as error:
            self.bear(error)
            self.runs.collect()  # at least what is ours
        return done

    def bear(self, error: OSError) -> None:
        """Say that the queue cannot be seen now; raise the error where it was gone already a second ago."""
        now = time.monotonic()
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            self.gone_at = self.gone_at or now
            if now >= self.gone_at + LOOK_AROUND:
                raise error
        self.news.say('/queue', f'cannot see the queue now: {explain(error)}; trying again')
        self.runs.look_at = now + LOOK_AROUND

    def start(self) -> tuple[str, int] | None:
        """Start what can be started; return the script that waits for resources, and how many it needs.

        Raises OSError.
        """
        claims = self.pool.claims
        while time.monotonic() < self.runs.look_at and not self.signals:
            name = self.pending.first(self.runs.is_ending)
            if name is None:
                claims.leave()
                return None
            if not (claims.left() or claims.kept):  # scripts of ours have all that there is
                return None
            try:
                number = self.pool.demand(f'{self.queue.to_run}/{name}')
                ids = claims.take_some(number, name)
                if not ids:
                    return name, number
                for ident in ids:
                    self.news.forget((self.pool.kind, ident))
                self.run(name, ids)
                self.pending.pop()
            except Stopped:
                return None
            except FastgpuError as error:
                self.pending.refuse(name, str(error))
            except OSError as error:
                self.pending.hold(name, explain(error))
        return None

    def tell_why(self, name: str, number: int) -> None:
        """Say what the script `name`, which needs so many resources, waits for."""
        pool = self.pool
        self.news.tell_why(pool, pool.all_ids(), self.runs.where)
        if number > 1:
            usable = len(pool.claims.usable())
            what = f'{number} {pool.kind}s at once' + f' (only {usable} can be used now)' * (usable < number)
            self.news.say(name, f'{name} waits for {what}, and all behind it wait too')

    def run(self, script: StrPath, ids: Sequence[Any]) -> bool:
        """Do what `ResourcePoolBase.run` says."""
        pool = self.pool
        taken = [ident for ident in ids for run in self.runs.values() if ident in run.held]
        if taken:
            raise FastgpuError(f'{self.runs.where(taken)} is in use')
        run = None
        try:
            locks = pool.claims.lend(*ids)
            environment = {'PYTHONUNBUFFERED': '1', **os.environ, **pool.environment(*ids)}
            run = self.queue.claim(os.path.basename(script), pool.kind, ids)
            self.runs[run.name] = run  # even if a KeyboardInterrupt comes now, it is seen to
            run.launch([*pool.wrapper, run.path], locks, environment)
            run.held = ids
            pool.claims.sign(ids, f'runs {run.name}', run.shim.pid)
            return True
        except OSError as error:
            if run:
                del self.runs[run.name]
                run.unclaim()
            elif isinstance(error, FileNotFoundError) and error.filename2:  # the rename: another poller was faster
                return False
            raise
        finally:
            if not (run and run.held):
                pool.claims.drop(*ids)

    def is_finished(self) -> bool:
        """Return whether there is nothing to do, nor after one more look around, which may put something back."""
        if self.runs or self.pending:
            return False
        self.runs.look_around()
        self.pending.look()
        return self.pending.first(self.runs.is_ending) is None and not (self.runs or self.pending)

    def sleep(self, seconds: float) -> None:
        """Wait until a script of ours ends, but no longer than so many seconds."""
        waiter = select.poll()
        for run in self.runs.values():
            if run.shim.runs_for_us and run.shim.pidfd >= 0:
                waiter.register(run.shim.pidfd, select.POLLIN)
        waiter.poll(seconds * 1000)

    def stop(self) -> bool:
        """Do what the signals so far ask for; return whether it is done."""
        self.pool.claims.leave()
        # Ours that run; one that has ended and cannot be collected now is for the next poller.
        alive = [run for run in self.runs.values() if run.shim.runs_for_us]
        if not self.runs.stopping():
            if alive:
                scripts = count(len(alive), 'script')
                self.news.say('/stop', f'interrupted: waiting for {scripts}; Ctrl-C again stops them')
            return not alive
        now = time.monotonic()
        if not self.stop_at:
            self.stop_at = now
            if alive:
                log(f'stopping {count(len(alive), "script")}: TERM now, KILL in {GRACE:.0f} s')
        for run in alive:
            if run.shim.kill_at is None and run.shim.exit_code() is None:
                run.terminate('stopped')
        self.runs.look_at = now  # at the scripts of others in each turn, two at least: they may have got TERM too
        alive += [run for run in self.runs.values() if not run.shim.process and run.shim.kill_at is not None]
        return (now > self.stop_at and not alive) or now > self.stop_at + 2 * GRACE

    def loose(self) -> list[Any]:
        """Return the resources that we locked and that no script of ours runs on."""
        used = {ident for run in self.runs.values() for ident in run.held}
        return [ident for ident in self.pool.claims.locks if ident not in used and ident not in self.lent]

    def sum_up(self) -> int:
        """Log what was done and what was left; return the exit status."""
        failed, left = self.runs.tally.ended['fail'], {}
        try:
            left = self.pending.left()
        except OSError as error:
            log(f'cannot see what is left in to_run: {explain(error)}')
        if not self.signals:
            for name, reason in left.items():
                log(f'left in to_run: {name} ({reason or "new"})')
        if self.runs:  # of an earlier poller, or not to be killed
            log(f'still running, and the next fastgpu_poll collects it: {listed(list(self.runs))}')
        if self.runs.tally.done() or left:
            summary = self.runs.tally.summary(self.pool.kind, len(left))
            log(f'{self.queue.host}: ' * self.runs.many_hosts + summary)
        elif not self.runs:
            log(f'nothing to run in {self.queue.to_run}' + ', which was made just now' * self.queue.is_new)
        if failed:
            log(f'failed: {listed(failed)}', alarm=True)
        status = 128 + self.signals[-1] if self.signals else int(bool(failed or left or self.runs.left_behind))
        self.signals.clear()
        return status


# --- Status: what there is to see, for everybody who may read the folders -------------------------------------------

def look_at_queue(pool: ResourcePoolBase) -> dict[str, Any]:
    """Return the state of the queue of `pool`: what `fastgpu_poll --status --json` prints, see the README.

    Takes nothing and changes nothing. Raises OSError where a folder cannot be read.
    """
    queue = pool.queue
    if queue.is_new and not isinstance(pool, ResourcePoolGPU):
        raise FastgpuError(f'{queue.path} is no queue: it has no folder to_run (fastgpu_poll makes one)')
    waiting = {} if queue.is_new else scripts_in(queue.to_run)
    names = {folder.name: names_in(folder) if folder.exists() else []  # before the first poller made them
             for folder in (queue.running, queue.complete, queue.fail)}
    pollers = queue.pollers()
    rows = {f'{pool.kind} {ident}': {'kind': pool.kind, 'id': ident, 'name': pool.label(ident), 'script': None,
                                     'user': None, 'seconds': None, **pool.look(ident)} for ident in pool.all_ids()}
    runs = [look_at_run(queue, name) for name in names['running']]
    elsewhere = [run for run in runs if run['state'] in (ELSEWHERE, LOST)]
    for run in runs:
        for ident in run['ids'] if run not in elsewhere else ():
            new = {'kind': run['kind'] or 'resource', 'id': ident, 'name': ident}
            row = rows.setdefault(f'{run["kind"]} {ident}', new)
            row.update({key: run[key] for key in ('script', 'user', 'seconds', 'state')},
                       reason='ended, the next fastgpu_poll collects it' if run['state'] == ENDED else None)
    some = names['complete'][::len(names['complete']) // 100 + 1]
    known = [run['seconds'] for run in (look_at_run(queue, name) for name in some) if run['seconds'] is not None]
    left = None
    if pollers and known and (waiting or runs):
        left = round(time_left(sum(known) / len(known), len(waiting), len(runs) or len(rows)), 1)
    last = sorted(names['fail'], key=lambda name: (file_mark(queue.fail / name)[2:], name), reverse=True)[:3]
    return {
        'path': str(queue.path), 'host': queue.host, 'pollers': pollers, 'resources': list(rows.values()),
        'elsewhere': elsewhere,
        'counts': {'to_run': len(waiting), **{folder: len(scripts) for folder, scripts in names.items()}},
        'next': [name for name, reason in waiting.items() if reason in ('', FRESH)][:3],
        'held': [name for name, reason in waiting.items() if reason == NOT_EXECUTABLE],
        'failed': [{'script': run.name, 'stderr': run.out('stderr'), 'last_line': last_line(run.out('stderr'))}
                   for run in (Run(queue, name) for name in last)],
        'seconds_left': left}


def look_at_run(queue: Queue, name: str) -> dict[str, Any]:
    """Return what the record of the run `name` says, its `Run.state`, and how long it took or has taken."""
    run, state, user = Run(queue, name), LOST, None
    with contextlib.suppress(OSError):
        state = run.state()
        user = user_name(os.fstat(run.record.fd).st_uid)
    run.record.close()
    record, seconds, now = run.record, None, None if state == ENDED else time.time()
    with contextlib.suppress(KeyError, TypeError):  # no record, or nobody saw when it ended
        seconds = round(max(0.0, record.get('finished', now) - record['started']), 1)
    return {'script': name, 'host': record.get('host'), 'kind': record.get('kind'), 'ids': record.get('ids', []),
            'pid': record.get('pid'), 'user': user, 'seconds': seconds, 'state': state}


def screen(status: dict[str, Any]) -> str:
    """Return a `status` for people, in lines."""
    rows, pollers = [], status['pollers']
    for each in status['resources'] + status['elsewhere']:
        used, total, reason = map(each.get, ('memory_used', 'memory_total', 'reason'))
        where = f'{each["kind"]} {each["name"]}' if 'name' in each else f'on {each["host"] or "?"}'
        memory = '' if used is None or total is None else f'{used / 1024:.1f} of {memory_text(total)}'
        run = [each['script'], each['user'], each['seconds'] is not None and duration(each['seconds'])]
        state = ', '.join(filter(None, run)) if each['script'] else each['state']
        rows.append([where, each.get('model') or '', memory, f'{state}: {reason}' if reason else state])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths) if width).rstrip() for row in rows]
    lines.append(' · '.join(f'{name} {number}' for name, number in status['counts'].items())
                 + f' · {count(len(pollers), "poller") if pollers else "no poller"} on {status["host"]}'
                 + f' (pid {", ".join(map(str, pollers))})' * bool(pollers)
                 + (f' · about {duration(status["seconds_left"])} left' if status['seconds_left'] is not None else ''))
    for key, what in ('next', 'next'), ('held', 'held until chmod +x'):
        if status[key]:
            lines.append(f'{what}: {listed(status[key])}')
    for failed in status['failed']:
        lines.append(f'failed: {failed["script"]}: {remark(failed["last_line"], failed["stderr"])}')
    return '\n'.join(map(shown, lines))


# --- Command --------------------------------------------------------------------------------------------------------

USAGE = """\
cancel: rm or mv the script, in to_run or in running     hold: chmod -x it
run again: mv fail/NAME to_run/                          order: by name
output: out/NAME.stdout, out/NAME.stderr, out/NAME.exitcode, live
Ctrl-C once: start nothing more and wait for what runs; twice: stop that too,
what did not end well goes back to to_run; kill -9 stops no script
exit status: 0 all ended well, 1 a script failed or was left in to_run,
2 wrong use or no GPUs, 128+N stopped by signal N; of --run that of CMD
example: fastgpu_poll --add <commands.txt && fastgpu_poll"""
# The options that are for some uses of the command only, and for which.
USERS = {'path': ('add', 'status', 'poll'), 'gpus': ('add', 'run'), 'json': ('status',), 'workers': ('status', 'poll'),
         'exit': ('poll',), 'wrapper': ('poll',), 'max_used': ('run', 'status', 'poll'),
         'per_gpu': ('run', 'status', 'poll')}


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


def parse(args: list[str] | None) -> argparse.Namespace:
    """Return the options in `args` (default: those of the process), and what they ask for as `mode`.

    That is one of add, run, status and poll. Raises SystemExit where that is all to be done.
    """
    parser = argparse.ArgumentParser(prog='fastgpu_poll', allow_abbrev=False, epilog=USAGE,
                                     description='Run the scripts in PATH/to_run on all GPUs, one GPU per script.',
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage='%(prog)s [options] [--status | --add [CMD ...] | --run CMD ...]')
    submit, polling, gpus = map(parser.add_argument_group, ('submit and see', 'poll', 'GPUs'))
    add = submit.add_argument
    add('--path', default='.', help='Path containing `to_run` directory (default: .)')
    add('--add', nargs=argparse.REMAINDER, metavar='CMD', help='Make CMD a script, or each line of standard input')
    add('--run', nargs=argparse.REMAINDER, metavar='CMD', help='Become CMD when a GPU is free: here and now')
    add('--gpus', type=positive, default=1, metavar='N', help='For these two: how many GPUs CMD needs (1)')
    add('--status', action='store_true', help='Show what runs and what waits, and exit')
    add('--json', action='store_true', help='With --status: as JSON')
    add('--version', action='version', version=f'fastgpu {__version__}')
    add = polling.add_argument
    add('--exit', type=int, default=1, choices=(0, 1), help='Exit when `to_run` is empty: 1, or wait for more: 0 (1)')
    add('--workers', type=positive, metavar='N', help='Use N plain slots instead of GPUs')
    add('--wrapper', type=words, default=[], metavar='CMD', help="Put CMD before each script, as 'timeout 4h'")
    add = gpus.add_argument
    add('--max-used', type=amount, default=1024, metavar='MIB', help='A GPU with more MiB in use is busy (1024)')
    add('--per-gpu', type=positive, default=1, metavar='N', help='Run up to N scripts on a GPU (1)')
    options, unknown = parser.parse_known_args(args)
    given = [mode for mode in ('add', 'run', 'status') if getattr(options, mode) not in (None, False)]
    if len(given) > 1:
        parser.error(f'--{given[0]} and --{given[1]} are two things: do one after the other')
    options.mode = (*given, 'poll')[0]
    if unknown:
        parser.error(f'{unknown[0]!r} is no option{what_was_meant(unknown[0], list(vars(options)))}')
    for name, modes in USERS.items():
        if options.mode not in modes and getattr(options, name) != parser.get_default(name):
            place = 'here' if options.mode == 'poll' else f'with --{options.mode}'
            users = ' and '.join(f'--{mode}' for mode in modes)
            users = users.replace('--poll', 'the fastgpu_poll that runs the scripts')
            parser.error(f'--{name.replace("_", "-")} does nothing {place}: it is for {users}')
    first, *more = options.add or options.run or ['']
    if first.startswith('-') or options.run == []:
        parser.error(f'--{options.mode} takes a command; options stand before it')
    if ' ' in first and not more and not (shutil.which(first) or os.path.exists(first)):
        parser.error(f'--{options.mode} takes words: {first}   or a line of shell: sh -c {shlex.quote(first)}')
    return options


def what_was_meant(word: str, options: list[str]) -> str:
    """Return a hint to who gave a `word` that is none of the `options`."""
    import difflib  # here, because it costs a start that needs none of it 2 ms
    if os.path.isdir(word):
        return f': did you mean --path {shown(word)}?'
    if not word.startswith('-'):
        return ': a script goes into to_run (mv or cp), a command behind --add or --run'
    close = difflib.get_close_matches(word.split('=')[0], [f'--{name.replace("_", "-")}' for name in options], 1)
    return f': did you mean {close[0]}?' if close else ''


def check_path(path: str) -> None:
    """Raise FastgpuError, with the remedy, where the folder `path` was probably not meant to hold a queue."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FastgpuError('the current folder was removed: cd to one that exists') from None
    if os.path.lexists(path) and not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if not os.path.lexists(path):
        tilde = '; a shell takes ~ for your home only after a space' * path.startswith('~')
        raise FastgpuError(f'{path or "an empty --path"}: there is no such folder{tilde or "; mkdir makes it"}')
    folder, name = os.path.split(os.path.realpath(path))
    if name in ('to_run', 'running', 'complete', 'fail', 'out') and os.path.isdir(f'{folder}/to_run'):
        raise FastgpuError(f'{path} is a folder of a queue: give its --path, {shlex.quote(folder)}')


def title(command: str) -> str:
    """Return what tells a `command` from others, for the name of a file: its words without paths, quotes and dashes."""
    text = re.sub(r'[^\s=]*/', '', command[:500].replace('"', '').replace("'", ''))
    return re.sub('[^A-Za-z0-9._]+', '-', re.sub(r'^\s*python[0-9.]*\s', '', text)).strip('-.')[:40].strip('-.')


def add_scripts(path: StrPath, commands: Sequence[str], gpus: int = 1) -> list[str]:
    """Put a script into to_run for each of the `commands`; return their names, job-000001-COMMAND.sh and so on.

    Numbers are never given twice. They run in the folder that is the current one now, with its programs and libraries:
    what of the environment says where these are is written into them. Raises FastgpuError for what cannot be a script,
    before anything is put there, and where only some could be; OSError where there is no queue.
    """
    queue = Queue(path)
    names: list[str] = []
    for command in commands:
        if '\0' in command:
            raise FastgpuError(f'no script can hold a NUL byte: {command[:60]}')
    kept = [f'{name}={shlex.quote(os.environ[name])}' for name in KEPT if name in os.environ]
    head = '#!/bin/sh\n' + f'#SBATCH --gpus={gpus}\n' * (gpus > 1) + f'cd {shlex.quote(os.getcwd())} || exit\n'
    head += f'export {" ".join(kept)}\n' * bool(kept)
    draft = queue.to_run / f'.job-{queue.host}-{os.getpid()}'
    # In it is the number that was given last.
    with open(os.open(queue.path / '.job.lock', os.O_RDWR | os.O_CREAT, 0o600), 'r+', errors='replace') as last:
        try:
            fcntl.flock(last, fcntl.LOCK_EX)  # one at a time, so that the commands of one stay together
            numbers = re.findall('^[0-9]{1,9}', last.read(9)) + [
                match[1] for folder in queue.folders for name in os.listdir(folder)
                if (match := re.match(r'job-([0-9]{1,9})[.-]', name))]
            for number, command in enumerate(commands, max(map(int, numbers), default=0) + 1):
                with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755), 'wb') as file:
                    file.write(os.fsencode(f'{head}{command}\n'))
                os.pwrite(last.fileno(), b'%09d' % number, 0)
                name = f'job-{number:06}-{title(command)}'.rstrip('-')
                names.append(safe_rename(draft, queue.to_run, f'{name}.sh').name)
        except (OSError, KeyboardInterrupt) as error:
            why = explain(error) if isinstance(error, OSError) else 'interrupted'
            done = f'the first {len(names)}, up to {names[-1]}' if names else 'none'
            raise FastgpuError(f'of {count(len(commands), "command")} {done} could be added: {why}') from None
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    return names


def read_commands() -> list[str]:
    """Return the lines of standard input, blank ones and comments left out; one that ends in a backslash goes on."""
    if not sys.stdin:
        return []
    if sys.stdin.isatty():
        write(sys.stderr, 'commands, one a line, to the end of the file (Ctrl-D):\n')
    text = re.sub(r'(?<!\\)((\\\\)*)\\\n', r'\1', os.fsdecode(sys.stdin.buffer.read()))
    lines = [line.strip() for line in text.split('\n')]
    return [line for line in lines if line and not line.startswith('#')]


def main(args: list[str] | None = None) -> int:
    """Run the command with `args` (default: those of the process) and return its exit status."""
    status, text = 0, ''
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # whoever started us closed it
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    try:
        options = parse(args)
        if options.mode != 'run':
            check_path(options.path)
        if options.mode == 'add':
            commands = [shlex.join(options.add)] if options.add else read_commands()
            text = ''.join(f'{name}\n' for name in add_scripts(options.path, commands, options.gpus))
            if not commands:
                complain('nothing to add: no commands on standard input')
        elif options.mode == 'status':
            seen = look_at_queue(find_pool(options))
            text = (json.dumps(seen, default=str, indent=1) if options.json else screen(seen)) + '\n'
        else:
            status = become(options) if options.mode == 'run' else poll(options)
    except SystemExit as error:  # of argparse
        status = int(error.code or 0)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (FastgpuError, OSError) as error:
        status = 2
        complain(explain(error))
    problem = write(sys.stdout, text)
    if problem:
        status = status or 1
        complain(f'standard output: {problem}')
    write(sys.stderr, '')  # what argparse left in its buffer
    return status


def poll(options: argparse.Namespace) -> int:
    """Run the scripts of the queue; return the exit status."""
    pool = find_pool(options)
    pool.wrapper = options.wrapper
    inherited = [os.readlink(fd) for fd in glob.glob('/proc/self/fd/*') if os.path.exists(fd)]
    if any(file.startswith(f'{pool.queue.out}/') and file.endswith('.json') for file in inherited):
        raise FastgpuError('this runs in a script of the same queue, and would wait for itself: use another --path')
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, if our parent did, it would hide how the shims end
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # as of a job that a shell has put into the background
        signal.signal(signal.SIGTERM, lambda signum, frame: pool.interrupt(signum))
    try:
        return pool.poll_scripts(exit_when_empty=bool(options.exit))
    except OSError as error:
        complain(f'{explain(error)}; what runs goes on, and the next fastgpu_poll collects it')
        return 1


def become(options: argparse.Namespace) -> int:
    """Wait until GPUs are free, and become the command of --run, which then holds them; return why that failed."""
    name = options.run[0]
    if not shutil.which(name):
        is_there = '/' in name and os.path.exists(name)
        complain(f'{name} cannot be executed: chmod +x' if is_there else f'there is no command {name!r}')
        return 126 if is_there else 127
    pool, news = ResourcePoolGPU(options.path, options.max_used, options.per_gpu, only_look=True), News()
    pool.rests = False  # that is for queues
    pool.check_number(options.gpus)
    while not (ids := pool.claims.take_some(options.gpus, os.path.basename(name))):
        news.tell_why(pool, pool.all_ids(), lambda ids: f'{pool.kind} {",".join(map(pool.label, ids))}')
        time.sleep(0.1)
    pool.claims.sign(ids, f'runs {os.path.basename(name)}', os.getpid())
    for fd in pool.claims.lend(*ids):
        os.set_inheritable(fd, True)
    for signum in signal.SIGPIPE, signal.SIGXFSZ:  # which Python ignores, and exec would not change that
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.execvpe(name, options.run, {**os.environ, **pool.environment(*ids)})
    except OSError as error:
        complain(explain(error))
    return 126


def find_pool(options: argparse.Namespace) -> ResourcePoolBase:
    """Return the pool that the options ask for; for --status without GPUs, one to see what runs."""
    only_look = options.mode == 'status'
    if options.workers:
        return FixedWorkerPool(range(options.workers), options.path, only_look)
    try:
        return ResourcePoolGPU(options.path, options.max_used, options.per_gpu, only_look)
    except NoGpus as error:
        if only_look:
            complain(f'no GPUs are shown: {error}')
            return FixedWorkerPool([], options.path, only_look)
        raise FastgpuError(f'{error}; --workers N runs without GPUs') from None


if __name__ == '__main__':
    sys.exit(main())
