"""Tests of fastgpu: help for them, the units that stand below the rules, the eight rules, and what is not a rule.

What is promised is under the rule that it follows from, for slots and for GPUs. Real processes, locks, signals and
folders; GPUs are those of the real nvidia-ml-py on a fake driver library, and real ones under the marker `gpu`.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import io
import itertools
import json
import mmap
import os
import pty
import pwd
import random
import re
import select
import shlex
import shutil
import signal
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from pathlib import Path

import pytest

import fastgpu
from fastgpu import (
    FastgpuError,
    FixedWorkerPool,
    Place,
    ResourcePoolBase,
    ResourcePoolGPU,
    find_next_script,
    safe_rename,
)

for signum in signal.SIGINT, signal.SIGQUIT:  # ignored in what a shell has put into the background
    signal.signal(signum, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as by nohup

MODULE = Path(fastgpu.__file__)
FOLDERS = 'to_run', 'running', 'complete', 'fail'
USER = fastgpu.user_name(os.getuid())
F_SETPIPE_SZ = 1031  # of fcntl(2), in Python since 3.10


# --- Help for the tests: a queue, its pollers, and waiting for something ----------------------------------------------

def poller_with(**constants):
    """Return the words that start fastgpu_poll as the installed one does, with other values for some `constants`."""
    change = ''.join(f'fastgpu.{name} = {value}; ' for name, value in constants.items())
    code = f'import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import fastgpu; {change}sys.exit(fastgpu.main())'
    return sys.executable, '-c', code


COMMAND = poller_with()


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
    """Let Python keep what it compiled, beside all that is ours: the tests start it hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('PYTHONDONTWRITEBYTECODE', raising=False)
        patch.setenv('PYTHONPYCACHEPREFIX', str(tmp_path_factory.mktemp('compiled')))
        yield


def until(condition, what='it', seconds=30):
    """Wait until `condition()` is true, and return what it returned."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f'waited {seconds} s for {what} in vain'
        time.sleep(0.01)


class Queue:
    """A folder to poll, the pollers that were started on it, and gates that hold its scripts until they are opened."""

    def __init__(self, path):
        self.path, self.q = path, shlex.quote(str(path))  # the second one for a shell
        self.command = COMMAND
        self.pollers = []
        fastgpu.setup_dirs(path)

    def change(self, **constants):
        """Let the pollers that start from now on have other values for these constants of fastgpu."""
        self.command = poller_with(**constants)

    def add(self, name, body='', mode=0o755, head='#!/bin/sh\n'):
        """Submit a script, written long enough ago to start at once."""
        script = self.path / 'to_run' / name
        script.write_text(head + body + '\n')
        os.utime(script, (1, 1))
        script.chmod(mode)
        return script

    def gate(self, name='gate'):
        """Return shell words that wait until `open_gate` is called."""
        return f'while [ ! -e {self.q}/{name} ]; do sleep 0.01; done; '

    def open_gate(self, name='gate'):
        (self.path / name).touch()

    def start(self, *args, command=None, log=None, stderr=None, **kwargs):
        """Start a poller in the background."""
        args = args or ('--workers', '2')
        log = log or self.path / f'poller-{len(self.pollers)}.log'
        with open(log, 'w') as err:
            poller = subprocess.Popen([*(command or self.command), *args, '--path', str(self.path)], stdout=err,
                                      stderr=stderr or err, stdin=subprocess.DEVNULL, **kwargs)
        poller.log = lambda: log.read_text(errors='surrogateescape')
        self.pollers.append(poller)
        return poller

    def poll(self, *args, **kwargs):
        """Run a poller to its end; return its exit status and what it said."""
        poller = self.start(*args, **kwargs)
        status = poller.wait(60)
        assert 'Traceback' not in poller.log()
        return status, poller.log()

    def let_look(self, poller):
        """Wait until `poller` has looked through to_run, from the first name to the last, since this was called."""
        for name in '!1', '!2':  # it names what is not executable when it comes by
            self.add(name, mode=0o644)
            until(lambda name=name: f'to_run/{name} waits' in poller.log())
        for name in '!1', '!2':
            (self.path / 'to_run' / name).unlink()

    def names(self, folder):
        return sorted(os.listdir(self.path / folder))

    def all(self):
        """Return {name: folder} of all scripts; no name is in two folders, but for one that moves while we look."""
        for _ in range(50):
            names = [(name, folder) for folder in FOLDERS for name in self.names(folder)]
            if len(dict(names)) == len(names):
                return dict(names)
        raise AssertionError(names)

    def out(self, name):
        return (self.path / 'out' / name).read_text()

    def has_out(self, name):
        return (self.path / 'out' / name).exists() and self.out(name)

    def record(self, name):
        with open(self.path / 'out' / f'{name}.json', 'rb', 0) as file:  # in one read: it may be written to just now
            return json.loads(file.read(1 << 16))

    def pid(self, name):
        """Return the pid of the shim of a run, when it is recorded: the script may already run before that."""
        return until(lambda: self.has_out(f'{name}.json') and self.record(name).get('pid'))


def alive(pid):
    """Return whether a process is alive: a zombie, for which init may take its time to wait, is not."""
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


def kill(process):
    process.kill()
    process.wait()


def kill_holding(poller, queue, name, locks):
    """Kill a poller whose script `name` runs when a lock file in `locks` says so, which comes after its record."""
    until(lambda: queue.names('running') == [name] and 'pid' in queue.record(name))
    until(lambda: any(f'runs {name} of' in file.read_text() for file in Path(locks).glob('*.lock')))
    kill(poller)


def started_by(mark):
    """Return the pids of the processes that have `mark` in their environment or their command (proc(5))."""
    found = []
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            if int(pid) != os.getpid() and any(os.fsencode(mark) in Path(f'/proc/{pid}/{file}').read_bytes()
                                               for file in ('environ', 'cmdline')):
                found.append(int(pid))
    return found


def used_by(pid):
    """Return the seconds of a core that a process has used so far, and the MiB that it had at most (proc(5))."""
    nanoseconds = int(Path(f'/proc/{pid}/schedstat').read_text().split()[0])
    memory = re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())[1]
    return nanoseconds / 1e9, int(memory) / 1024


@pytest.fixture(autouse=True)
def no_left_overs(tmp_path, monkeypatch):
    """End what a test left running: the processes that have its folder in their environment, or in their command."""
    monkeypatch.setenv('FASTGPU_TEST', str(tmp_path))
    yield
    while pids := started_by(f'{tmp_path}'):  # one that is found may just have started another
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def queue(tmp_path):
    queue = Queue(tmp_path / 'q')
    yield queue
    for poller in queue.pollers:
        kill(poller)


@pytest.fixture
def wp(tmp_path):
    return FixedWorkerPool(range(4), tmp_path / 'q')


def fails(number):
    """Return a function that fails with this error."""
    def function(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return function


def failing(folder, call, where, number=errno.EIO):
    """Let os.`call` of a path that ends in `where` fail in a poller, with this error, while the file `away` is there.

    Returns the environment of such a poller, that file, and a function that counts how often it failed.
    """
    away, failed = folder / 'away', folder / 'failed'
    failed.touch()
    (folder / 'sitecustomize.py').write_text(f"""
import functools, os
right = os.{call}
def fails(path='.', *args, **kwargs):
    if str(path).endswith({where!r}) and os.access({str(away)!r}, os.F_OK):
        with open({str(failed)!r}, 'a') as file:
            file.write('x')
        raise OSError({number}, os.strerror({number}), str(path))
    return right(path, *args, **kwargs)
os.{call} = functools.partial(fails)  # not a function, which in a class (pathlib of 3.9) would become a method
""")
    return {**os.environ, 'PYTHONPATH': str(folder)}, away, lambda: len(failed.read_text())


def on_host(name, boot=None, command=COMMAND):
    """Return the words that run `command` on a host of that name; the file `boot` has its kernel's boot id."""
    words = ['unshare', '--uts', '--mount', 'sh', '-c', 'hostname "$0" && '
             + f'mount --bind {boot} /proc/sys/kernel/random/boot_id && ' * bool(boot) + 'exec "$@"', name]
    if os.getuid() or subprocess.run([*words, 'true'], check=False, capture_output=True).returncode:
        pytest.skip('cannot make another host here')
    return (*words, *command)


@pytest.fixture
def small_disk(tmp_path):
    """A queue on a disk of 64 KiB."""
    path = tmp_path / 'disk'
    path.mkdir()
    if os.getuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k,mode=755', 'tmpfs', path], check=False,
                                     capture_output=True).returncode:
        pytest.skip('cannot mount a small disk here')
    queue = Queue(path)
    yield queue
    for poller in queue.pollers:
        kill(poller)
    until(lambda: subprocess.run(['umount', path], check=False, capture_output=True).returncode == 0)


def fill(path):
    """Fill the disk to the last byte; return the file that does."""
    with open(path / 'filler', 'wb', 0) as file:
        while True:
            try:
                file.write(b'x' * 4096)
            except OSError:
                return path / 'filler'


def take_lock(path, *place):
    """Return a descriptor that holds a place in a lock file, by default the whole; None where somebody else does."""
    fd = fastgpu.open_lock(path)
    return fd if Place(path, *place).lock(fd) else os.close(fd)


def why_locked(path, *place):
    return Place(path, *place).why_locked()


NOT_OURS = 'locked, and not by fastgpu (fuser -v {} tells by whom)'
AS_NOBODY = ('import grp, locale, os, shutil, sys, fastgpu; os.setgid(65534); os.setuid(65534)\n'
             'sys.exit(fastgpu.main(sys.argv[1:]))')
TRAP = 'trap "echo saved; exit {}" TERM; echo ready; while :; do sleep 0.01; done'


def run_command(*args, **kwargs):
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, **kwargs)


def answer(*args):
    """Return the exit status of the command and what it says on stderr, run in this process: for what it refuses."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return fastgpu.main(list(map(str, args))), err.getvalue()


def status(queue, *args, **kwargs):
    """Return what --status --json and --status say."""
    command = [*COMMAND, '--path', str(queue.path), '--status', *args]
    as_json = subprocess.run([*command, '--json'], check=True, capture_output=True, text=True, **kwargs).stdout
    return json.loads(as_json), subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout


# --- Help: GPUs, which are those of the real nvidia-ml-py on a fake driver library, or of a fake nvidia-smi -----------

FAKE_DRIVER = '''
import ctypes, json, os, time, pynvml

seen = {}

class Driver:
    "What libnvidia-ml.so.1 would export, with the state of the file that FAKE_DRIVER names."

    def __getattribute__(self, name):
        if name.startswith('nvml') and name in self.state().get('missing', []):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def state(self):
        version = os.stat(os.environ['FAKE_DRIVER'])
        if seen.get('version') != (version.st_ino, version.st_mtime_ns):
            with open(os.environ['FAKE_DRIVER']) as file:
                seen.update(state=json.load(file), version=(version.st_ino, version.st_mtime_ns))
        return seen['state']

    def answer(self, name, device):
        "Count the call, take the time it takes, and return what it is to return."
        calls = os.environ['FAKE_DRIVER'] + '.calls'
        if os.path.exists(calls):
            with open(calls, 'a') as file:
                file.write(f"{name} {device.get('uuid', '-')} {time.monotonic()}\\n")
        if 'delay' in device:
            time.sleep(device['delay'])
        return device.get(name, 0)

    def device(self, handle):
        "A GPU has the handle 0x100, 0x200, ..., its MIG instances those that follow."
        number, instance = divmod(ctypes.cast(handle, ctypes.c_void_p).value, 0x100)
        gpu = self.state()['gpus'][number - 1]
        return gpu['mig'][instance - 1] if instance else gpu

    def point(self, handle, value):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = value
        return 0

    up = False

    def nvmlInitWithFlags(self, flags):
        self.up = not self.state().get('init', 0)
        return self.state().get('init', 0)

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, number):
        number._obj.value = len(self.state()['gpus'])
        return self.state().get('count', 0)

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        self.point(handle, 0x100 * (index.value + 1))
        return self.state()['gpus'][index.value].get('handle', 0)

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if self.state().get('gone'):
            self.up = False
        if not self.up:
            return self.state().get('gone') or pynvml.NVML_ERROR_UNINITIALIZED
        for number, gpu in enumerate(self.state()['gpus'], 1):
            for instance, device in enumerate([gpu, *gpu.get('mig', [])]):
                if device and device['uuid'].encode() == uuid.value and 'by-uuid' not in device:
                    return self.point(handle, 0x100 * number + instance)
        return self.state().get('by-uuid', pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetName(self, handle, text, size):
        text.value = b'NVIDIA H100'
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = self.device(handle)['uuid'].encode()
        return self.device(handle).get('uuid-error', 0)

    def nvmlDeviceGetMigMode(self, handle, current, pending):
        current._obj.value = int('mig' in self.device(handle))
        return 0 if current._obj.value else self.device(handle).get('migmode', pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle, number):
        number._obj.value = 7
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index, instance):
        instances = self.device(handle)['mig']
        if index.value >= len(instances) or not instances[index.value]:
            return pynvml.NVML_ERROR_NOT_FOUND
        return self.point(instance, ctypes.cast(handle, ctypes.c_void_p).value + index.value + 1)

    def nvmlDeviceGetMemoryInfo_v2(self, handle, memory):
        device = self.device(handle)
        if 'mig' in device:
            return pynvml.NVML_ERROR_NO_PERMISSION
        memory._obj.total, memory._obj.used = device.get('total', 80 * 1024) << 20, device.get('used', 500) << 20
        return self.answer('memory', device)

    nvmlDeviceGetMemoryInfo = nvmlDeviceGetMemoryInfo_v2

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, number, processes):
        device = self.device(handle)
        pids = device.get('pids', [])
        room, number._obj.value = number._obj.value, len(pids)
        if room < len(pids) or device.get('grows'):
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        self.fill(device, processes, pids)
        return self.answer('processes', device)

    nvmlDeviceGetComputeRunningProcesses_v2 = nvmlDeviceGetComputeRunningProcesses_v3

    def fill(self, device, processes, pids):
        "Tell processes, each with its memory: 300 MiB, what the state says, or (None) not available."
        for process, pid in zip(processes or [], pids):
            memory = device.get('memory_of', {}).get(str(pid), 300)
            process.pid, process.usedGpuMemory = pid, 2**64 - 1 if memory is None else memory << 20

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle, number, processes):
        device = self.device(handle)
        pids = device.get('graphics', [])
        room, number._obj.value = number._obj.value, len(pids)
        if room < len(pids):
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        self.fill(device, processes, pids)
        return self.answer('graphics-error', device)

    def nvmlDeviceGetComputeMode(self, handle, mode):
        mode._obj.value = self.device(handle).get('mode', 0)
        return self.answer('mode-error', self.device(handle))

    def nvmlDeviceGetFieldValues(self, handle, number, fields):
        action = self.device(handle).get('action')
        self.answer('field', {**self.device(handle), 'delay': self.device(handle).get('field_delay', 0)})
        for field in fields._obj:
            field.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if action is None else 0
            field.valueType, field.value.uiVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, action or 0
            assert field.fieldId == 230
        return 0

    def nvmlDeviceGetNumaNodeId(self, handle, node):
        node._obj.value = self.device(handle).get('numa', 0)
        return 0 if 'numa' in self.device(handle) else pynvml.NVML_ERROR_NOT_SUPPORTED

    def nvmlDeviceGetGpuInstanceId(self, handle, number):
        number._obj.value = ctypes.cast(handle, ctypes.c_void_p).value % 0x100
        return 0

    def nvmlDeviceGetComputeInstanceId(self, handle, number):
        number._obj.value = 0
        return 0

pynvml.nvmlLib = Driver()
pynvml._nvmlGetFunctionPointer_cache.clear()
'''


class Gpus:
    """The fake GPUs of a host: a list of dicts that the driver answers from, `save`d for it to see."""

    def __init__(self, path, monkeypatch):
        self.file = path / 'driver.json'
        self.gpus = []
        self.log = Path(f'{self.file}.calls')
        self.log.touch()
        self.locks = path / 'locks'
        self.locks.mkdir()
        site = path / 'site'
        site.mkdir()
        (site / 'sitecustomize.py').write_text(FAKE_DRIVER)
        monkeypatch.setenv('FAKE_DRIVER', str(self.file))
        monkeypatch.setenv('FASTGPU_LOCK_DIR', str(self.locks))
        monkeypatch.setenv('PYTHONPATH', str(site))
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        pynvml = pytest.importorskip('pynvml')
        monkeypatch.setattr(pynvml, 'nvmlLib', None)
        exec(FAKE_DRIVER, {})

    def have(self, number):
        self.set(*({'uuid': f'GPU-{n:08}-aaaa-bbbb-cccc-0123456789ab'} for n in range(number)))

    def set(self, *gpus, **state):
        """Make these the GPUs, and this the state of the driver."""
        self.gpus = list(gpus)
        self.save(**state)

    def change(self, number, **state):
        """Change the state of one GPU."""
        self.gpus[number].update(state)
        self.save()

    def save(self, **state):
        self.file.with_suffix('.new').write_text(json.dumps({'gpus': self.gpus, **state}))
        os.rename(self.file.with_suffix('.new'), self.file)

    def calls(self, name):
        """Return the times of the calls of that name for a device, as [(uuid, seconds)]."""
        lines = self.log.read_text().splitlines()
        return [(uuid, float(seconds)) for call, uuid, seconds in map(str.split, lines) if call == name]


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    gpus = Gpus(tmp_path, monkeypatch)
    gpus.have(2)
    return gpus


@pytest.fixture
def pool(gpus, queue):
    gpus.have(1)
    return ResourcePoolGPU(queue.path)


@pytest.fixture
def queues(tmp_path, gpus):
    gpus.have(1)
    queues = [Queue(tmp_path / f'q{n}') for n in range(4)]
    yield queues
    for poller in itertools.chain(*(queue.pollers for queue in queues)):
        kill(poller)


def in_turn(queues):
    """Return the queues of the scripts that ended, as numbers, in the order in which these started."""
    return [number for _, number in sorted((queue.record(name)['started'], number) for number, queue in
                                           enumerate(queues) for name in queue.names('complete'))]


@pytest.fixture
def mps(tmp_path):
    """The pid of a process with the name of the server of MPS."""
    shutil.copy(shutil.which('sleep'), tmp_path / 'nvidia-cuda-mps-server')
    process = subprocess.Popen([tmp_path / 'nvidia-cuda-mps-server', '100'])
    yield process.pid
    kill(process)


def mig_box(gpus):
    """A plain GPU, one in MIG mode with three instances and a gap, and one in MIG mode with none."""
    instances = [{'uuid': 'MIG-1', 'total': 10240}, None, {'uuid': 'MIG-2'}, {'uuid': 'MIG-3'}]
    gpus.set({'uuid': A}, {'uuid': B, 'mig': instances}, {'uuid': C, 'mig': []})


SEES = 'echo $FASTGPU_ID $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER'
A, B, C = 'GPU-aaaa1111-0', 'GPU-aaaa2222-0', 'GPU-cccc3333-0'
NOT_SUPPORTED = 3
FAKE_SMI = r"""#!/bin/sh
# Answers `-q -x [-i UUID]` from the files attached and gpu.UUID, in the form of the real one.
cd {path}
[ -e broken ] && {{ cat broken; exit 9; }}
[ "$3" = -i ] && [ ! -e "gpu.$4" ] && {{ echo "No devices were found"; exit 6; }}
[ -e noise ] && cat noise
echo '<?xml version="1.0" ?>'
echo '<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">'
echo "<nvidia_smi_log><driver_version>580.65</driver_version><attached_gpus>$(cat attached)</attached_gpus>"
if [ "$3" = -i ]; then cat "gpu.$4"; else cat gpu.*; fi
echo '</nvidia_smi_log>'
"""
SMI_GPU = """<gpu id="00000000:01:00.0"><product_name>NVIDIA H100</product_name>
<mig_mode><current_mig>{mig}</current_mig><pending_mig>{mig}</pending_mig></mig_mode><uuid>{uuid}</uuid>
<gpu_recovery_action>{action}</gpu_recovery_action><compute_mode>{mode}</compute_mode>
<fb_memory_usage><total>{total}</total><reserved>551 MiB</reserved><used>{used}</used></fb_memory_usage>
<processes>{processes}</processes></gpu>
"""
SMI_PROCESS = ('<process_info><gpu_instance_id>N/A</gpu_instance_id><pid>{}</pid><type>{}</type>'
               '<process_name>python</process_name><used_memory>{}</used_memory></process_info>')


class Smi:
    """A box with nvidia-smi for two GPUs, and without nvidia-ml-py."""

    def __init__(self, path):
        self.path = path
        self.attached(2)
        for uuid in A, B:
            self.gpu(uuid)

    def gpu(self, uuid, *processes, mig='N/A', action='None', mode='Default', total='81559 MiB', used='3 MiB'):
        """Make this the state of a GPU; a process is (pid, type, memory)."""
        text = SMI_GPU.format(uuid=uuid, mig=mig, action=action, mode=mode, total=total, used=used,
                              processes=''.join(SMI_PROCESS.format(*process) for process in processes))
        (self.path / 'new').write_text(text)
        os.rename(self.path / 'new', self.path / f'gpu.{uuid}')

    def lose(self, uuid):
        (self.path / f'gpu.{uuid}').unlink()

    def attached(self, number):
        (self.path / 'attached').write_text(str(number))


@pytest.fixture
def smi(tmp_path, monkeypatch):
    path = tmp_path / 'smi'
    (path / 'bin').mkdir(parents=True)
    (path / 'bin' / 'nvidia-smi').write_text(FAKE_SMI.format(path=shlex.quote(str(path))))
    (path / 'bin' / 'nvidia-smi').chmod(0o755)
    (path / 'site').mkdir()
    (path / 'site' / 'pynvml.py').write_text('raise ImportError')
    monkeypatch.setenv('PATH', f'{path}/bin:{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', str(path / 'site'))
    monkeypatch.setenv('FASTGPU_LOCK_DIR', str(tmp_path))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return Smi(path)


# --- Messages ---------------------------------------------------------------------------------------------------------

def test_what_is_shown_cannot_garble_a_terminal():
    assert fastgpu.shown('naïve 名 x.sh') == 'naïve 名 x.sh'
    assert fastgpu.shown('a\nb\x1b[31m\x7f') == r'a\nb\x1b[31m\x7f'
    assert fastgpu.shown(os.fsdecode(b'\xff\xfe')) == r'\udcff\udcfe'
    assert fastgpu.shown('\u202egnp.sh') == r'\u202egnp.sh'


@pytest.mark.parametrize(('seconds', 'text'), [(0.04, '0.0 s'), (-1, '0.0 s'), (59.9, '59.9 s'), (61, '0:01:01'),
                                               (86400 * 7 + 1, '168:00:01')])
def test_duration(seconds, text):
    assert fastgpu.duration(seconds) == text


@pytest.mark.parametrize(('code', 'text'), [(None, 'cut off'), (3, 'status 3'), (137, 'status 137, SIGKILL'),
                                            (255, 'status 255')])
def test_describe(code, text):
    assert fastgpu.describe(code) == text


# --- Folders: what is a script, and when it is taken ------------------------------------------------------------------

def test_setup_dirs_makes_the_five_folders_for_us_alone_to_write(tmp_path):
    old = os.umask(0)
    try:
        folders = fastgpu.setup_dirs(tmp_path / 'q')
    finally:
        os.umask(old)
    assert [folder.name for folder in folders] == ['to_run', 'running', 'complete', 'fail', 'out']
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o755}
    assert fastgpu.setup_dirs(str(tmp_path / 'q')) == folders


def test_find_next_script_is_the_first_executable_file_or_link(queue):
    to_run = queue.path / 'to_run'
    assert find_next_script(to_run) is None
    (to_run / 'a-folder').mkdir()
    os.mkfifo(to_run / 'b-fifo', 0o755)
    (to_run / 'c-dangling').symlink_to('nowhere')
    queue.add('.hidden')
    queue.add('d-no-x.sh', mode=0o644)
    assert find_next_script(to_run) is None
    last = queue.add('z.sh')
    assert find_next_script(to_run) == last
    (to_run / 'e-link').symlink_to(last)
    assert find_next_script(to_run) == to_run / 'e-link'
    assert find_next_script(str(to_run)) == to_run / 'e-link'


def test_what_editors_leave_is_no_script(queue):
    queue.add('a.sh', 'echo new')
    left = '#a.sh#', '.#a.sh', 'a.sh~', 'a.sh.bak', 'a.sh.orig', '.a.sh.swp', 'a.sh.swp'
    for name in left:
        queue.add(name, 'echo half typed')
    status, log = queue.poll()
    assert (status, [name for name in left if name in log]) == (0, [])
    assert queue.all() == {'a.sh': 'complete', **dict.fromkeys(left, 'to_run')}


@pytest.mark.skipif(not shutil.which('emacs'), reason='there is no emacs here')
def test_what_emacs_leaves_while_one_edits_is_no_script(queue):
    script = queue.add('a.sh', 'echo old')
    edit = (f'(progn (find-file "{script}") (goto-char (point-max)) (insert "echo typed") (do-auto-save) '
            '(princ (directory-files ".")) (kill-emacs))')
    subprocess.run(['emacs', '-Q', '--batch', '--eval', edit], check=True, cwd=queue.path / 'to_run')
    (queue.path / 'to_run' / '#a.sh#').chmod(0o755)
    os.utime(queue.path / 'to_run' / '#a.sh#', (1, 1))
    assert queue.poll()[0] == 0
    assert queue.all() == {'a.sh': 'complete', '#a.sh#': 'to_run'}


def test_what_is_no_script_is_ignored(queue):
    to_run = queue.path / 'to_run'
    (to_run / 'folder').mkdir()
    os.mkfifo(to_run / 'fifo', 0o755)
    queue.add('.hidden')
    status, log = queue.poll()
    assert status == 0
    assert f'nothing to run in {queue.path}/to_run' in log
    assert sorted(os.listdir(to_run)) == ['.hidden', 'fifo', 'folder']


def test_a_script_just_written_is_not_taken_yet(queue):
    script = queue.add('a.sh')
    os.utime(script)
    if time.time() - script.stat().st_mtime < 0.05:
        assert find_next_script(queue.path / 'to_run') is None
    until(lambda: find_next_script(queue.path / 'to_run') == script)
    os.utime(script, (time.time() + 1000,) * 2)
    assert find_next_script(queue.path / 'to_run') == script


def test_where_stamps_are_whole_seconds_just_written_is_a_second(queue):
    script = queue.add('a.sh')
    now = int(time.time())
    os.utime(script, (now, now))
    if time.time() < now + 0.9:
        assert find_next_script(queue.path / 'to_run') is None
    until(lambda: find_next_script(queue.path / 'to_run'))
    assert time.time() > now + 1


@pytest.mark.parametrize('ahead', [0.02, 2, -2])
def test_just_written_is_by_the_clock_of_the_file_system_not_by_ours(queue, tmp_path, ahead):
    (tmp_path / 'sitecustomize.py').write_text('import time\nright = time.time\n'
                                               f'time.time = lambda: right() + {ahead}\n')
    poller = queue.start('--workers', '2', '--exit', '0', env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    files = [open(queue.path / 'to_run' / f'{number}.sh', 'w', buffering=1) for number in range(8)]  # noqa: SIM115
    for file in files:
        os.fchmod(file.fileno(), 0o755)
        file.write('#!/bin/sh\n')
    written = [time.monotonic()] * len(files)
    gaps = [0.0] * len(files)
    for _, (number, file) in itertools.product(range(12), list(enumerate(files))):  # as copies over a slow line
        time.sleep(0.005)
        file.write('echo one more line\n')
        gaps[number] = max(gaps[number], time.monotonic() - written[number])
        written[number] = time.monotonic()
    for number, file in enumerate(files):
        file.close()
        gaps[number] = max(gaps[number], time.monotonic() - written[number])
    until(lambda: len(queue.names('complete') + queue.names('fail')) == len(files))
    for number, gap in enumerate(gaps):
        if gap < fastgpu.JUST_WRITTEN * 0.9:  # the line was not so slow, for this one
            assert queue.out(f'{number}.sh.stdout') == 'one more line\n' * 12
    poller.kill()


def test_chmod_submits(queue):
    script = queue.add('a.sh', mode=0o644)
    poller = queue.start('--exit', '0', '--workers', '1')
    until(lambda: 'a.sh waits' in poller.log())
    script.chmod(0o755)
    until(lambda: queue.names('complete') == ['a.sh'])
    assert poller.poll() is None


def test_a_script_added_as_to_run_is_listed_is_not_overlooked_at_the_end(queue):
    # The time stamp of a folder is coarse: here it stays what it was when the poller listed the folder last.
    b = queue.add('b.sh')
    b.rename(queue.path / 'b.sh')
    queue.add('a.sh', f'cd {queue.q}; sleep 0.5; touch -r to_run stamp; mv b.sh to_run; touch -r stamp to_run')
    assert queue.poll()[0] == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}


def test_any_name_runs_and_is_logged_escaped(queue):
    names = [os.fsdecode(name) for name in (
        b'with space', b'new\nline', b'quo"te\'s', b'-rf', b'$HOME;`id`', b'\xff\xfe.sh', b'\x1b[31mred',
        'ä→名'.encode(), b'*', b'a\\b', b'%s%d')]
    for name in names:
        queue.add(name, 'printf %s "$0"; exit 4')
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == dict.fromkeys(names, 'fail')
    for name in names:
        assert queue.out(f'{name}.exitcode') == '4'
        assert os.fsencode(queue.path / 'running' / name) == (queue.path / 'out' / f'{name}.stdout').read_bytes()
        assert f' fail {fastgpu.shown(name)} (status 4, ' in log
        assert queue.record(name)['script'] == name
    assert '\x1b' not in log


def without_renameat2(monkeypatch):
    """Let the C library not be found, and the answer from when it was be forgotten."""
    monkeypatch.setattr(ctypes, 'CDLL', fails(errno.ENOENT))
    monkeypatch.setattr(fastgpu, 'renameat2', fastgpu.renameat2.__wrapped__)


@pytest.mark.parametrize('lacks', [(), ('renameat2',), ('renameat2', 'links')])
def test_safe_rename_never_overwrites(tmp_path, monkeypatch, lacks):
    if 'renameat2' in lacks:  # NFS, and all others but local ones
        without_renameat2(monkeypatch)
    if 'links' in lacks:  # sshfs
        monkeypatch.setattr(os, 'link', fails(errno.EPERM))
    dest = tmp_path / 'dest'
    dest.mkdir()
    for text, name in ('one', 'a.sh'), ('two', 'a-1.sh'), ('three', 'a-2.sh'):
        file = tmp_path / 'a.sh'
        file.write_text(text)
        assert safe_rename(file, dest) == dest / name
    assert [(dest / name).read_text() for name in ('a.sh', 'a-1.sh', 'a-2.sh')] == ['one', 'two', 'three']
    (dest / 'link').symlink_to('nowhere')
    (tmp_path / 'link').touch()
    assert safe_rename(str(tmp_path / 'link'), str(dest)) == dest / 'link-1'
    with pytest.raises(FileNotFoundError):
        safe_rename(tmp_path / 'a.sh', dest)
    assert os.listdir(tmp_path) == ['dest']


def test_a_crash_in_the_middle_of_a_rename_by_two_names_is_completed_by_the_next(tmp_path, monkeypatch):
    without_renameat2(monkeypatch)
    (tmp_path / 'dest').mkdir()
    file = tmp_path / 'a.sh'
    file.touch()
    with monkeypatch.context() as crash:
        crash.setattr(os, 'unlink', fails(errno.EIO))
        with pytest.raises(OSError, match='Input/output'):
            safe_rename(file, tmp_path / 'dest')
    assert safe_rename(file, tmp_path / 'dest') == tmp_path / 'dest' / 'a.sh'
    assert os.listdir(tmp_path / 'dest') == ['a.sh']
    assert not file.exists()


# --- Locks ------------------------------------------------------------------------------------------------------------

def test_a_lock_is_held_by_one_and_dropped_with_its_descriptor(tmp_path):
    path = tmp_path / 'l.lock'
    fd = take_lock(path)
    assert fd is not None
    assert take_lock(path) is None
    os.close(fd)
    again = take_lock(path)
    assert again is not None
    os.close(again)


def test_the_places_in_a_lock_file_are_held_by_one_each_and_all_of_them_by_one(tmp_path):
    path = tmp_path / 'l.lock'
    assert why_locked(path) == ''
    assert not path.exists()
    one, two = take_lock(path, 0, 1), take_lock(path, 1, 1)
    assert take_lock(path, 1, 1) is None
    assert take_lock(path) is None
    assert why_locked(path, 2, 1) == ''
    Place(path, 1, 1).write_note(two, 'runs b.sh')
    os.close(one)
    assert why_locked(path) == why_locked(path, 1, 1) == 'busy: runs b.sh'
    os.close(two)
    everything = take_lock(path)
    assert take_lock(path, 7, 1) is None
    asking = fastgpu.open_lock(path)
    assert Place(path, 7, 1).asking.lock(asking)
    assert why_locked(path, 7, 1) == 'busy: ' + NOT_OURS.format(path)
    os.close(everything)
    assert why_locked(path) == ''  # nobody has it because somebody asks
    os.close(asking)


def test_a_lock_is_inherited_and_given_back_by_whoever_holds_it(tmp_path):
    path = tmp_path / 'l.lock'
    fd = take_lock(path)
    child = subprocess.Popen(['sleep', '1000'], pass_fds=[fd])
    other = fastgpu.open_lock(path)
    os.close(fd)
    assert not Place(path).lock(other)
    kill(child)
    assert Place(path).lock(other)
    child = subprocess.Popen(['sleep', '1000'], pass_fds=[other])
    Place(path).unlock(other)
    assert take_lock(path) is not None
    kill(child)


def test_a_lock_file_can_be_opened_by_all_users_whatever_the_umask_and_is_not_cleaned_away(tmp_path):
    old = os.umask(0o077)
    try:
        os.close(take_lock(tmp_path / 'l.lock'))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'l.lock').stat().st_mode) == 0o1666


def test_a_deleted_lock_file_is_no_lock(tmp_path):
    path = tmp_path / 'l.lock'
    fd = fastgpu.open_lock(path)
    path.unlink()
    path.touch()
    assert not Place(path).lock(fd)
    path.unlink()
    assert not Place(path).lock(fd)
    os.close(fd)


@pytest.mark.parametrize('number', [errno.EAGAIN, errno.EACCES])
def test_either_answer_of_the_kernel_that_a_lock_is_held_means_that(tmp_path, monkeypatch, number):
    def held(fd, command, argument):  # fcntl(2): "fails with EACCES or EAGAIN"
        raise OSError(number, os.strerror(number))

    with open(fastgpu.open_lock(tmp_path / 'l.lock'), 'r+b') as file:
        monkeypatch.setattr(fcntl, 'fcntl', held)
        assert not Place(tmp_path / 'l.lock').lock(file.fileno())


def test_who_only_looks_takes_no_turn_from_who_starts(tmp_path):
    pool = FixedWorkerPool([0], tmp_path / 'q')
    assert pool.lock(0)
    pool.unlock(0)
    look = 'import fastgpu, sys\nwhile True: fastgpu.Place(sys.argv[1]).why_locked()'
    onlookers = [subprocess.Popen([sys.executable, '-c', look, pool.place(0).path], cwd=MODULE.parent) for _ in '12']
    until(lambda: all(used_by(each.pid)[0] > 0.2 for each in onlookers))  # they have come past their imports
    for _ in range(500):
        assert pool.lock_next() == 0
        pool.unlock(0)
    assert [each.poll() for each in onlookers] == [None, None]  # they looked all the time
    for each in onlookers:
        kill(each)


def test_what_is_not_a_lock_file_is_refused_and_untouched(tmp_path):
    mine, other = tmp_path / 'mine', tmp_path / 'other'
    for file in mine, other:
        file.write_text('precious')
    (tmp_path / 'link').symlink_to(mine)
    os.link(other, tmp_path / 'hard')
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'folder').mkdir()
    for name in 'link', 'hard', 'fifo', 'folder':
        with pytest.raises(OSError, match=name):
            fastgpu.open_lock(tmp_path / name)
    assert mine.read_text() == other.read_text() == 'precious'


def test_what_a_lock_file_says_of_an_earlier_holder_is_gone_when_it_is_locked(tmp_path):
    pool = FixedWorkerPool([0], tmp_path / 'q')
    Path(pool.place(0).path).write_text('runs old.sh of ann')
    assert pool.lock(0)
    assert why_locked(pool.place(0).path).startswith('busy: a lock of ')


def test_what_a_file_server_says_when_a_lock_is_given_back_costs_no_resource(queue, monkeypatch):
    pool = FixedWorkerPool([0], queue.path)
    assert pool.lock_next() == 0
    real = os.close
    with monkeypatch.context() as server:
        server.setattr(fcntl, 'fcntl', fails(errno.EIO))
        server.setattr(os, 'close', lambda fd: (real(fd), fails(errno.EIO)())[0])  # it is closed all the same, close(2)
        pool.unlock(0)
    assert FixedWorkerPool([0], queue.path).lock_next() == 0


def test_who_waits_longest_is_first_and_is_so_no_longer_when_he_is_killed(tmp_path):
    path = str(tmp_path / 'lock')
    lines = [fastgpu.Line(path, fastgpu.WAITING) for _ in range(3)]
    looker = fastgpu.open_lock(path)
    assert not lines[0].before_us(looker) > 0
    lines[1].join(1)
    lines[0].join(1000000)
    assert [line.before_us(looker) for line in lines] == [1, 0, 2]
    lines[1].leave()
    assert [line.before_us(looker) > 0 for line in lines] == [False, True, True]
    lines[1].join(2000000)  # anew, behind all
    assert [line.before_us(looker) > 0 for line in lines] == [False, True, True]
    os.close(lines[0].fd)
    lines[0].fd, lines[0].since = -1, 0
    assert [line.before_us(looker) > 0 for line in lines] == [True, False, True]


# --- Runs: what a script gets and what it leaves ----------------------------------------------------------------------

def test_a_record_that_a_crash_spoilt_is_none(tmp_path):
    file = tmp_path / 'r.json'
    record = fastgpu.Record(str(file))
    good = {'script': 'x', 'host': 'h', 'ids': [0], 'started': 1.0}
    spoilt = [{**good, **change} for change in (
        {'script': 1}, {'script': ''}, {'script': '..'}, {'script': '/etc/x'}, {'script': '\ud800'}, {'script': '.x'},
        {'started': None}, {'started': float('nan')}, {'started': 10**400}, {'ids': None}, {'ids': 5}, {'host': None})]
    for text in ['', '{', '[]', '7', 'null', '[' * 100000, '\x00' * 100, *map(json.dumps, spoilt)]:
        file.write_text(text)
        record.open()
        assert record == {}, text
    file.write_text(json.dumps(good))
    record.open()
    assert record == good
    record['ids'] = []  # shorter than before
    record.save()
    assert json.loads(file.read_text()) == {**good, 'ids': []}
    record.close()


def test_a_run_leaves_its_output_its_status_and_its_record(queue):
    queue.add('a.sh', 'echo out; echo err >&2; cat; exit 3')
    before = time.time()
    status, log = queue.poll('--workers', '1')
    assert status == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.names('out') == ['a.sh.exitcode', 'a.sh.json', 'a.sh.stderr', 'a.sh.stdout']
    assert queue.out('a.sh.stdout') == 'out\n'
    assert queue.out('a.sh.stderr') == 'err\n'
    assert queue.out('a.sh.exitcode') == '3'
    record = queue.record('a.sh')
    assert list(record) == ['script', 'host', 'boot', 'machine', 'pids', 'kind', 'ids', 'started', 'pid', 'finished',
                            'exitcode']
    assert {key: record[key] for key in ('host', 'boot', 'machine', 'pids')} == fastgpu.this_host()
    assert [record[key] for key in ('script', 'host', 'ids', 'exitcode')] == ['a.sh', os.uname().nodename, [0], 3]
    assert before - 0.1 <= record['started'] <= record['finished'] <= time.time()
    assert re.search(r'^\S+ worker 0: fail a.sh \(status 3, \d\.\d s\): err \(.*/q/out/a.sh.stderr\)$', log, re.M)


def test_scripts_run_in_sorted_order_each_with_a_session_of_its_own(queue):
    for name in '10', '9', 'B', 'a':
        queue.add(name, 'ps -o sid= -p $$; echo $$; pwd')
    assert queue.poll('--workers', '1', cwd='/')[0] == 0
    started = {name: queue.record(name)['started'] for name in queue.names('complete')}
    assert sorted(started, key=started.get) == ['10', '9', 'B', 'a']
    session, pid, folder = queue.out('a.stdout').split()
    assert session != pid  # the shim's, and not the poller's
    assert int(session) == queue.pid('a')
    assert folder == '/'


def test_one_that_sorts_first_starts_first_though_it_came_when_all_were_listed(queue):
    for name in 'b1', 'b2', 'b3':
        queue.add(name, queue.gate())
    poller = queue.start('--workers', '1')
    until(lambda: queue.names('running') == ['b1'])
    queue.add('a')
    queue.add('A', mode=0o644)  # is told when to_run is listed anew
    until(lambda: 'A waits for its chmod +x' in poller.log())
    queue.open_gate()
    assert poller.wait(30) == 1
    started = {name: queue.record(name)['started'] for name in queue.names('complete')}
    assert sorted(started, key=started.get) == ['b1', 'a', 'b2', 'b3']


def test_a_script_is_seen_also_where_the_time_stamp_of_the_folder_does_not_tell_it(queue):
    pending = fastgpu.Pending(fastgpu.Queue(queue.path), fastgpu.News())
    pending.update()
    stamp = os.stat(pending.folder).st_mtime_ns
    queue.add('a')
    os.utime(pending.folder, ns=(stamp, stamp))
    until(lambda: pending.first(lambda name: False) == 'a')


def test_slots_are_used_at_once_and_reused(queue):
    for name in 'abcd':
        queue.add(name, f'echo $FASTGPU_ID; touch {queue.q}/{name}; ' + queue.gate())
    poller = queue.start('--workers', '3')
    until(lambda: all((queue.path / name).exists() for name in 'abc'))
    assert queue.all() == {'a': 'running', 'b': 'running', 'c': 'running', 'd': 'to_run'}
    queue.open_gate()
    assert poller.wait(30) == 0
    assert sorted(queue.out(f'{name}.stdout') for name in 'abc') == ['0\n', '1\n', '2\n']


def test_a_script_without_interpreter_line_runs_under_sh(queue):
    queue.add('a', 'echo $((1+1))', head='')
    assert queue.poll()[0] == 0
    assert queue.out('a.stdout') == '2\n'


def test_a_signal_that_ends_a_script_is_its_status(queue):
    queue.add('a.sh', 'kill -SEGV $$')
    status, log = queue.poll()
    assert status == 1
    assert queue.out('a.sh.exitcode') == '139'
    assert 'status 139, SIGSEGV' in log


def test_a_signal_to_its_group_is_for_the_script_to_handle(queue):
    signals = 'USR1', 'USR2', 'ALRM', 'PIPE', 'QUIT', 'HUP', 'INT', 'TERM'
    for name in signals:
        queue.add(name, f'trap "echo caught" {name}; kill -{name} 0; echo done')
    assert queue.poll()[0] == 0
    assert {name: queue.out(f'{name}.stdout') for name in signals} == dict.fromkeys(signals, 'caught\ndone\n')


def test_what_a_script_in_python_prints_is_seen_at_once_unless_it_says_otherwise(queue, monkeypatch):
    queue.add('a.sh', 'echo "<$PYTHONUNBUFFERED>"')
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    queue.poll()
    assert queue.out('a.sh.stdout') == '<1>\n'
    monkeypatch.setenv('PYTHONUNBUFFERED', '')
    queue.add('a.sh', 'echo "<$PYTHONUNBUFFERED>"')
    queue.poll()
    assert queue.out('a-1.sh.stdout') == '<>\n'


def test_a_wrapper_is_put_before_the_path_as_a_shell_would_split_it_and_runs_no_shell(queue):
    queue.add('a b.sh', 'echo "$WORD"; exit 7')
    assert queue.poll('--workers', '1', '--wrapper', "env WORD='a $HOME;  b'")[0] == 1
    assert queue.out('a b.sh.stdout') == 'a $HOME;  b\n'
    assert queue.out('a b.sh.exitcode') == '7'


# --- Rule 1: nothing is lost ------------------------------------------------------------------------------------------

def test_a_name_used_again_keeps_both_runs(queue):
    for n in range(3):
        queue.add('a.sh', f'echo {n}; exit {n}')
        queue.poll()
    assert queue.all() == {'a.sh': 'complete', 'a-1.sh': 'fail', 'a-2.sh': 'fail'}
    assert [queue.out(f'{name}.stdout') for name in ('a.sh', 'a-1.sh', 'a-2.sh')] == ['0\n', '1\n', '2\n']
    assert queue.record('a-2.sh')['script'] == 'a.sh'


def test_a_name_is_taken_as_long_as_anything_is_left_of_it(queue):
    (queue.path / 'out' / 'a.sh.stdout').write_text('old')
    (queue.path / 'fail' / 'a-1.sh').write_text('old')
    queue.add('a.sh', 'echo new')
    queue.poll()
    assert queue.out('a.sh.stdout') == 'old'
    assert (queue.path / 'fail' / 'a-1.sh').read_text() == 'old'
    assert queue.out('a-2.sh.stdout') == 'new\n'


def test_what_was_cut_off_is_run_again_under_its_own_name(queue):
    queue.add('a.sh', f'echo run; [ -e {queue.q}/gate ] || exec sleep 1000')
    first = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    queue.pid('a.sh')
    kill(first)
    os.killpg(queue.pid('a.sh'), signal.SIGKILL)  # as the power would
    queue.open_gate()
    status, log = queue.poll('--workers', '1')
    assert status == 0
    assert re.search(r'worker 0: requeue a.sh \(cut off, \d+\.\d s\)', log)
    assert queue.all() == {'a-1.sh': 'complete'}
    assert queue.record('a-1.sh')['script'] == 'a.sh'
    assert queue.out('a.sh.stdout') == queue.out('a-1.sh.stdout') == 'run\n'
    assert queue.record('a.sh')['exitcode'] is None


def test_what_was_cut_off_does_not_overwrite_its_successor(queue):
    queue.add('a.sh', 'echo old; exec sleep 1000')
    first = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    queue.pid('a.sh')
    kill(first)
    os.killpg(queue.pid('a.sh'), signal.SIGKILL)
    queue.add('a.sh', 'echo new', mode=0o644)
    second = queue.start('--workers', '1', '--exit', '0')
    until(lambda: queue.names('to_run') == ['a.sh'] and queue.names('running') == ['a-1.sh'])
    assert 'echo new' in (queue.path / 'to_run' / 'a.sh').read_text()
    assert 'requeue a.sh as a-1.sh (cut off' in second.log()


def test_a_script_that_kills_its_own_group_each_time_fails_the_second_time(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', 'kill -9 0')
    status, log = queue.poll('--workers', '1')
    assert status == 1
    assert queue.all() == {'a-1.sh': 'fail'}
    assert queue.out('a-1.sh.exitcode') == '137'
    assert 'requeue a.sh (cut off' in log


CRASH = """
import os, signal, sys, fastgpu
left = int(sys.argv.pop(1))
fastgpu.LOOK_AROUND = 0.1
def step():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def audit(event, args):
    if event in STEPS or event == 'open' and isinstance(args[2], int) and args[2] & os.O_CREAT:
        step()
STEPS = 'os.rename', 'os.remove', 'os.truncate', 'os.chmod', 'os.killpg', 'fcntl.flock', 'subprocess.Popen'
def also_before(module, name):
    function = getattr(module, name)
    setattr(module, name, lambda *args: [step(), function(*args)][1])
also_before(os, 'pwrite')
also_before(os, 'pidfd_open')
also_before(fastgpu, 'rename_new')
sys.addaudithook(audit)
sys.exit(fastgpu.main())
"""


@pytest.mark.parametrize(('body', 'stride'), [('exit 3', 1), ('kill -9 0', 13)])
def test_a_crash_at_any_step_loses_nothing_and_repeats_nothing(tmp_path, monkeypatch, body, stride):
    monkeypatch.setattr(fastgpu, 'LOOK_AROUND', 0.1)
    for number in itertools.count(1, stride):
        queue = Queue(tmp_path / str(number))
        for name in 'a', 'b':  # the second starts before the first is collected
            queue.add(f'{name}.sh', f'echo run >> {queue.q}/{name}; echo whole; {body}')
        crashing = queue.start(str(number), '--workers', '1', command=(sys.executable, '-c', CRASH), cwd=MODULE.parent)
        code = crashing.wait(30)
        if code != -signal.SIGKILL:
            break
        FixedWorkerPool([0], queue.path).poll_scripts()
        assert set(queue.all().values()) == {'fail'}, number
        assert len(queue.all()) == 2, number
        for name in 'a', 'b':
            ran = (queue.path / name).read_text().count('run')
            assert ran == len([out for out in queue.names('out') if re.match(f'{name}.*stdout', out)]), number
            assert ran == 1 or body != 'exit 3', number
        for name in queue.all():
            assert queue.out(f'{name}.exitcode') == ('3' if body == 'exit 3' else '137')
            assert queue.out(f'{name}.stdout') == 'whole\n'
        records = [name[:-5] for name in queue.names('out') if name.endswith('.json')]
        assert all('finished' in queue.record(name) for name in records if queue.has_out(f'{name}.stdout')), number
        assert FixedWorkerPool([0], queue.path).find_next() == 0
    assert code == 1
    assert number > 24


def test_a_crash_before_the_rename_costs_no_more_than_the_name(queue):
    pool = FixedWorkerPool([0], queue.path)
    queue.add('a.sh', 'echo once')
    if os.fork() == 0:
        os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        pool.run('a.sh', 0)
    os.wait()
    assert queue.names('out') == ['a.sh.json']
    assert queue.all() == {'a.sh': 'to_run'}
    assert queue.poll()[0] == 0
    assert queue.all() == {'a-1.sh': 'complete'}
    assert queue.out('a-1.sh.stdout') == 'once\n'


def test_a_crash_between_rename_and_launch_puts_the_script_back(queue):
    pool = FixedWorkerPool([0], queue.path)
    queue.add('a.sh', 'echo once')
    if os.fork() == 0:
        subprocess.Popen = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        pool.run('a.sh', 0)
    os.wait()
    assert queue.all() == {'a.sh': 'running'}
    assert queue.poll()[0] == 0
    assert [queue.out(f'{name}.stdout') for name in queue.all()] == ['once\n']
    assert list(queue.all().values()) == ['complete']


def test_a_full_disk_delays_a_start_and_loses_nothing(small_disk, tmp_path):
    queue = small_disk
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', 'echo once')
    poller = queue.start('--workers', '1', '--exit', '0', log=tmp_path / 'log')
    until(lambda: queue.names('complete') == ['a.sh'])
    queue.add('b.sh', 'echo once', mode=0o644)
    (queue.path / f'.{os.uname().nodename}-0.lock').write_text('')  # or its new text would make room
    filler = fill(queue.path)
    (queue.path / 'to_run' / 'b.sh').chmod(0o755)
    until(lambda: 'cannot start b.sh now: ' in poller.log())
    assert queue.names('to_run') == ['b.sh']
    assert FixedWorkerPool([0], queue.path).find_next() == 0  # not held meanwhile
    filler.unlink()
    until(lambda: queue.names('complete') == ['a.sh', 'b.sh'])
    assert queue.out('b.sh.stdout') == 'once\n'
    assert poller.poll() is None


def test_a_script_that_ends_on_a_full_disk_is_collected_with_its_status_when_there_is_room(small_disk, tmp_path):
    queue = small_disk
    queue.add('a.sh', f'while [ ! -e {shlex.quote(str(tmp_path))}/full ]; do sleep 0.01; done; exit 5')
    poller = queue.start('--workers', '1', log=tmp_path / 'log')
    until(lambda: queue.names('running') == ['a.sh'] and 'pid' in queue.record('a.sh'))
    filler = fill(queue.path)
    (tmp_path / 'full').touch()
    until(lambda: 'cannot collect a.sh now: ' in poller.log())
    assert queue.all() == {'a.sh': 'running'}
    assert FixedWorkerPool([0], queue.path).find_next() == 0
    filler.unlink()
    assert poller.wait(30) == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.out('a.sh.exitcode') == '5'


def test_a_disk_that_becomes_read_only_is_waited_for(small_disk, tmp_path):
    queue = small_disk
    queue.add('a.sh', f'while [ ! -e {shlex.quote(str(tmp_path))}/go ]; do sleep 0.01; done; exit 5')
    poller = queue.start('--workers', '1', log=tmp_path / 'log')
    until(lambda: queue.names('running') == ['a.sh'] and 'pid' in queue.record('a.sh'))
    pid = queue.pid('a.sh')
    (tmp_path / 'go').touch()
    poller.send_signal(signal.SIGSTOP)
    until(lambda: not alive(pid))
    (queue.path / 'out' / 'a.sh.exitcode').unlink()  # as if it had not been able to write
    until(lambda: subprocess.run(['mount', '-o', 'remount,ro', queue.path], check=False,
                                 capture_output=True).returncode == 0 or poller.send_signal(signal.SIGCONT))
    poller.send_signal(signal.SIGCONT)
    until(lambda: 'cannot collect a.sh now: ' in poller.log() or poller.poll() is not None)
    subprocess.run(['mount', '-o', 'remount,rw', queue.path], check=True)
    poller.wait(30)
    assert queue.all() == {'a.sh': 'fail'}


@pytest.mark.skipif(os.getuid() != 0, reason='root has no limit of processes, and only root can become another user')
def test_no_process_for_a_script_delays_its_start():
    limit = """
import grp, locale, os, resource, shutil, sys, time, fastgpu
claim, fastgpu.LOOK_AROUND = fastgpu.Queue.claim, 0.3
fastgpu.Queue.claim = lambda *args: [os.write(2, f'tried at {time.monotonic()}\\n'.encode()), claim(*args)][1]
os.setgid(12345)
os.setuid(12345)
resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv.pop(1)),) * 2)
sys.exit(fastgpu.main())
"""
    with tempfile.TemporaryDirectory() as path:
        queue = Queue(Path(path))
        queue.add('a.sh', 'exit 3')
        for folder in path, *Path(path).iterdir():
            os.chown(folder, 12345, 12345)
        for number in 1, 2:  # for the poller alone, and for the shim too
            with tempfile.TemporaryDirectory() as logs:
                poller = queue.start(str(number), '--workers', '1', command=(sys.executable, '-c', limit),
                                     cwd=MODULE.parent, log=Path(logs) / 'log')
                until(lambda poller=poller: poller.log().count('tried at ') > 2)
                poller.terminate()
                assert poller.wait(30) == 143
                assert 'cannot start a.sh now: ' in poller.log()
                tried = list(map(float, re.findall('tried at (.*)', poller.log())))
                assert all(later - earlier > 0.29 for earlier, later in zip(tried, tried[1:]))  # not all the time
            assert queue.all() == {'a.sh': 'to_run'}
            assert queue.names('out') == []
        for folder in path, *Path(path).iterdir():
            os.chown(folder, 0, 0)
        assert queue.poll('--workers', '1')[0] == 1
        assert queue.out('a.sh.exitcode') == '3'


def test_a_script_that_cannot_be_started_now_stays_and_is_started_later(queue):
    # Without room for the files of its output: a stand-in for all that a machine can lack.
    shutil.rmtree(queue.path / 'out')
    (queue.path / 'full').mkdir()
    (queue.path / 'out').symlink_to('full')
    queue.add('a.sh')
    pool = FixedWorkerPool([0], queue.path)
    (queue.path / 'out').unlink()
    (queue.path / 'out').symlink_to('elsewhere')
    with pytest.raises(OSError, match=r'elsewhere|a\.sh'):
        pool.run(queue.path / 'to_run' / 'a.sh', 0)
    assert queue.all() == {'a.sh': 'to_run'}
    (queue.path / 'elsewhere').mkdir()
    assert pool.poll_scripts() == 0
    assert queue.all() == {'a.sh': 'complete'}


def test_no_more_descriptors_at_any_step_is_no_reason_to_lose_a_script(queue):
    queue.add('a.sh')
    code = ('import resource, sys, fastgpu; pool = fastgpu.FixedWorkerPool([0], sys.argv[1])\n'
            'resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), 4096))\n'
            'try: print(pool.run("a.sh", 0))\n'
            'except OSError as error: print(error.errno)')
    for files in range(4, 20):
        run = subprocess.run([sys.executable, '-c', code, str(queue.path), str(files)], capture_output=True, text=True,
                             env={**os.environ, 'PYTHONPATH': str(MODULE.parent)})
        assert run.returncode == 0, run.stderr
        if run.stdout == 'True\n':
            break
        assert queue.all() == {'a.sh': 'to_run'}
        assert queue.names('out') == []
    assert files > 6
    assert list(queue.all()) == ['a.sh']


# --- Rule 2: each script runs once ------------------------------------------------------------------------------------

def test_two_pollers_run_100_scripts_once_each(queue):
    ran = queue.path / 'ran'
    for n in range(100):
        queue.add(f'{n:03}.sh', f'echo {n:03}.sh >> {shlex.quote(str(ran))}')
    pollers = [queue.start('--workers', '2') for _ in range(2)]
    assert [poller.wait(60) for poller in pollers] == [0, 0]
    assert Counter(ran.read_text().split()) == Counter({f'{n:03}.sh': 1 for n in range(100)})
    assert set(queue.all().values()) == {'complete'}
    assert len(queue.names('complete')) == 100
    assert len(queue.names('out')) == 400


def test_two_claims_of_one_name_are_two_runs(queue):
    queue.add('a.sh')
    first, second = (FixedWorkerPool([0], queue.path).queue for _ in range(2))
    run = first.claim('a.sh', 'worker', [0])
    os.rename(queue.path / 'running' / 'a.sh', queue.path / 'to_run' / 'a.sh')  # as before its rename
    other = second.claim('a.sh', 'worker', [0])
    assert (run.name, other.name) == ('a.sh', 'a-1.sh')
    other.unclaim()
    assert queue.names('out') == ['a.sh.json']


def test_a_script_that_vanishes_between_look_and_claim_leaves_no_trace(queue):
    pool = FixedWorkerPool([0], queue.path)
    script = queue.add('a.sh')
    script.unlink()
    assert not pool.run(script, 0)
    assert queue.names('out') == []
    assert pool.find_next() == 0


def test_a_script_under_two_names_after_a_crash_runs_once(queue):
    queue.add('a.sh', queue.gate())
    first = queue.start('--workers', '2')
    queue.pid('a.sh')
    os.link(queue.path / 'running' / 'a.sh', queue.path / 'to_run' / 'a.sh')
    queue.let_look(first)
    assert queue.names('running') == ['a.sh']
    (queue.path / 'to_run' / 'a.sh').unlink()
    queue.open_gate()
    assert first.wait(30) == 0


def test_a_status_that_neither_shim_nor_poller_could_write_is_unknown_and_the_script_not_repeated(small_disk, tmp_path):
    queue = small_disk
    queue.change(LOOK_AROUND=0.2)
    wait = 'until [ -e full ]; do sleep 0.01; done'
    queue.add('a.sh', f'cd {shlex.quote(str(tmp_path))}; {wait}; echo x >> ran; exit 5')
    poller = queue.start('--workers', '1', log=tmp_path / 'log')
    until(lambda: queue.names('running') == ['a.sh'] and 'pid' in queue.record('a.sh'))
    kill(poller)
    filler = fill(queue.path)
    (tmp_path / 'full').touch()
    until(lambda: 'a.sh.exitcode' in queue.names('out'))
    until(lambda: not alive(queue.record('a.sh')['pid']))
    filler.unlink()
    poller = queue.start('--workers', '1', log=tmp_path / 'log')
    assert poller.wait(30) == 1
    assert 'fail a.sh (status unknown, the disk was full, ' in poller.log()
    assert queue.all() == {'a.sh': 'fail'}
    assert (tmp_path / 'ran').read_text() == 'x\n'


def test_a_script_that_ends_with_254_and_no_room_for_that_is_not_taken_for_one_that_never_started(small_disk, tmp_path):
    queue = small_disk
    subprocess.run(['mount', '-o', 'remount,nr_inodes=60', queue.path], check=True)
    fill = 'n=0; while touch more$n 2>/dev/null; do n=$((n+1)); done'
    queue.add('a.sh', f'echo >>{shlex.quote(str(tmp_path))}/runs; cd {queue.q}; {fill}; echo precious >&2; exit 254')
    poller = queue.start('--workers', '1', log=tmp_path / 'log')
    until(lambda: 'cannot collect a.sh now' in poller.log())
    for file in queue.path.glob('more*'):
        file.unlink()
    assert poller.wait(30) == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.out('a.sh.exitcode') == '254'
    assert 'precious\n' in queue.out('a.sh.stderr')
    assert (tmp_path / 'runs').read_text() == '\n'


def test_a_script_that_ends_while_a_later_poller_looks_at_it_is_taken_for_what_it_is(queue, monkeypatch):
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '1')
    pid = queue.pid('a.sh')
    kill(poller)
    run, right = fastgpu.Run(fastgpu.Queue(queue.path), 'a.sh'), os.access

    def access(path, mode):  # is asked for the record, after its exit status was not there
        queue.open_gate()
        until(lambda: not alive(pid))
        return right(path, mode)

    monkeypatch.setattr(os, 'access', access)
    assert (run.state(), run.code) == ('ended', 0)


def test_a_close_that_fails_does_not_undo_a_start(queue, monkeypatch):  # close(2): EIO, of a file server
    queue.add('a.sh', f'echo run >> {queue.q}/ran; ' + queue.gate())
    pool, right = FixedWorkerPool([0], queue.path), os.close

    def fails(fd):
        ours = os.readlink(f'/proc/self/fd/{fd}').startswith(f'{queue.path}/out')
        right(fd)
        if ours:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as server:
        server.setattr(os, 'close', fails)
        assert pool.run('a.sh', 0)
    assert queue.all() == {'a.sh': 'running'}
    queue.open_gate()
    assert pool.poll_scripts() == 0
    assert (queue.path / 'ran').read_text() == 'run\n'


def test_a_script_that_says_what_the_shim_says_where_nothing_can_start_is_taken_for_what_it_is(queue):
    queue.add('a.sh', f'echo result; echo "{fastgpu.NO_PROCESS}" >&2; exit {fastgpu.NOT_STARTED}')
    assert queue.poll()[0] == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.out('a.sh.stdout') == 'result\n'


@pytest.mark.parametrize('of', ['its poller', 'a later poller'])
def test_a_shim_killed_alone_keeps_its_slot_to_the_script_which_does_not_run_again(queue, of):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', f'echo run >> {queue.q}/ran; ' + queue.gate())
    queue.add('b.sh')
    poller = queue.start('--workers', '1')
    until(lambda: (queue.path / 'ran').exists())
    pid = queue.pid('a.sh')
    if of == 'a later poller':
        kill(poller)
        poller = queue.start('--workers', '1')
        until(lambda: 'worker 0 busy' in poller.log())
    os.kill(pid, signal.SIGKILL)
    until(lambda: 'worker 0 busy' in poller.log() and queue.record('a.sh').get('shim_killed'))
    queue.let_look(poller)
    assert queue.all() == {'a.sh': 'running', 'b.sh': 'to_run'}
    queue.open_gate()
    assert poller.wait(30) == 1
    assert 'fail a.sh (status unknown, the shell that waits for it was killed, ' in poller.log()
    assert queue.all() == {'a.sh': 'fail', 'b.sh': 'complete'}
    assert (queue.path / 'ran').read_text() == 'run\n'


def test_a_script_that_ends_right_after_its_shim_was_killed_does_not_run_again(queue):
    queue.change(LOOK_AROUND=600)  # what it notes of that, it notes at once
    queue.add('a.sh', f'echo run >> {queue.q}/ran; ' + queue.gate())
    poller = queue.start('--workers', '1')
    until(lambda: (queue.path / 'ran').exists())
    os.kill(queue.pid('a.sh'), signal.SIGKILL)
    until(lambda: queue.record('a.sh').get('shim_killed'))
    kill(poller)
    queue.open_gate()
    queue.change(LOOK_AROUND=0.2)
    assert queue.poll('--workers', '1')[0] == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert (queue.path / 'ran').read_text() == 'run\n'


@pytest.mark.parametrize('wrapper', ['', '--wrapper=closing'])
def test_a_group_that_is_killed_whole_is_requeued_and_a_shim_alone_is_not(queue, monkeypatch, wrapper):
    queue.change(LOOK_AROUND=0.2)
    closing = queue.path / 'closing'
    code = 'import os, sys; os.closerange(3, 1000); os.execv(sys.argv[1], sys.argv[1:])'
    closing.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", code])} "$@"\n')
    closing.chmod(0o755)
    monkeypatch.setenv('PATH', f'{queue.path}:{os.environ["PATH"]}')
    for name in 'whole', 'shim':
        queue.add(name, f'echo run >> {queue.q}/{name}.ran; ' + queue.gate())
    poller = queue.start('--workers', '2', *filter(None, [wrapper]))
    until(lambda: all((queue.path / f'{name}.ran').exists() for name in ('whole', 'shim')))
    os.kill(queue.pid('shim'), signal.SIGKILL)
    os.killpg(queue.pid('whole'), signal.SIGKILL)
    until(lambda: 'requeue whole (cut off' in poller.log() and queue.record('shim').get('shim_killed'))
    queue.open_gate()
    assert poller.wait(30) == 1
    assert queue.all() == {'whole-1': 'complete', 'shim': 'fail'}
    assert (queue.path / 'shim.ran').read_text() == 'run\n'


def test_an_edited_record_does_not_make_its_script_run_twice(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', f'echo run >> {queue.q}/ran; ' + queue.gate())
    first = queue.start('--workers', '1')
    until(lambda: (queue.path / 'ran').exists() and 'pid' in queue.record('a.sh'))
    record = queue.path / 'out' / 'a.sh.json'
    shutil.copy(record, record.with_suffix('.new'))
    os.rename(record.with_suffix('.new'), record)  # as editors do: a new file, which nobody locks
    second = queue.start('--workers', '2')
    until(lambda: 'waiting for a.sh, which runs without this poller' in second.log())
    queue.open_gate()
    assert [first.wait(30), second.wait(30)] == [0, 0]
    assert queue.all() == {'a.sh': 'complete'}
    assert (queue.path / 'ran').read_text() == 'run\n'


def test_a_name_in_running_without_a_record_is_left_alone_and_named(queue):
    queue.add('a.sh')
    os.rename(queue.path / 'to_run' / 'a.sh', queue.path / 'running' / 'a.sh')
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == {'a.sh': 'running'}
    assert 'running/a.sh has no record in out; if nothing runs it: mv ' in log


def test_runs_of_another_host_are_left_alone_and_named(queue):
    queue.add('a.sh')
    os.rename(queue.path / 'to_run' / 'a.sh', queue.path / 'running' / 'a.sh')
    record = {'script': 'a.sh', 'host': 'far\x1baway', 'ids': [0], 'started': 1.0, 'pid': 1}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    status, log = queue.poll()
    assert status == 0
    assert queue.all() == {'a.sh': 'running'}
    command = f'{shlex.join(["mv", f"{queue.path}/running/a.sh", f"{queue.path}/to_run"])}/'
    assert f'a.sh runs on far\\x1baway; if no fastgpu_poll will run there again: {command}\n' in log
    subprocess.run(command, shell=True, check=True)
    assert queue.poll()[0] == 0
    assert queue.all() == {'a-1.sh': 'complete'}


@pytest.mark.parametrize(('code', 'folder'), [(0, 'complete'), (3, 'fail')])
def test_a_run_that_ended_on_another_host_is_not_to_be_run_again(queue, code, folder):
    queue.add('a.sh').rename(queue.path / 'running' / 'a.sh')
    record = {'script': 'a.sh', 'host': 'far', 'ids': [0], 'started': 1.0, 'pid': 1}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    (queue.path / 'out' / 'a.sh.exitcode').write_text(str(code))
    log = queue.poll()[1]
    said = rf'a.sh ended \(status {code}\) on far; if no fastgpu_poll will run there again: (mv .*)\n'
    mend = re.search(said, log)[1]
    subprocess.run(mend, shell=True, check=True)
    assert queue.all() == {'a.sh': folder}


def test_pollers_of_two_hosts_share_a_queue_and_leave_each_others_runs_alone(queue, tmp_path):
    for n in range(40):
        queue.add(f'{n:02}', f'echo {n} >> {queue.q}/ran')
    queue.add('00', f'echo 0 >> {queue.q}/ran; ' + queue.gate())
    hosts = []
    for name in 'one', 'two':
        (tmp_path / name).write_text(f'boot of {name}\n')
        hosts.append(on_host(name, tmp_path / name, poller_with(LOOK_AROUND=0.2)))
    pollers = [queue.start('--workers', '1', command=host) for host in hosts]
    until(lambda: len(queue.names('complete')) == 39)
    owner = ['one', 'two'].index(queue.record('00')['host'])
    other = pollers[1 - owner]
    assert other.wait(30) == 0  # what runs elsewhere is not waited for
    assert queue.names('running') == ['00']
    kill(pollers[owner])
    os.killpg(queue.pid('00'), signal.SIGKILL)
    third = queue.start('--workers', '1', command=hosts[1 - owner])
    assert third.wait(30) == 0
    assert queue.names('running') == ['00']
    said = f'00 runs on {["one", "two"][owner]}; if no fastgpu_poll will run there again: (mv .*)'
    command = re.search(said, third.log())[1]
    subprocess.run(command, shell=True, check=True)
    queue.open_gate()
    assert queue.poll()[0] == 0
    assert sorted(map(int, (queue.path / 'ran').read_text().split())) == sorted([0, *range(40)])


# --- Rule 3: a GPU has one owner --------------------------------------------------------------------------------------

def test_a_resource_is_not_given_to_a_second_script(wp):
    queue = Queue(wp.path)
    for name in 'ab':
        queue.add(name, queue.gate())
    assert wp.run('a', 0)
    with pytest.raises(FastgpuError, match='worker 0 is in use'):
        wp.run('b', 0)
    assert FixedWorkerPool([0], wp.path).lock_next() is None
    queue.open_gate()
    assert wp.poll_scripts() == 0


def test_two_pollers_on_one_host_share_the_slots(queue):
    queue.change(LOOK_AROUND=0.2)
    for name in 'abcd':
        queue.add(name, queue.gate())
    pollers = [queue.start('--workers', '2') for _ in range(2)]
    until(lambda: len(queue.names('running')) == 2 and any('busy: runs' in poller.log() for poller in pollers))
    assert len(queue.names('to_run')) == 2
    queue.open_gate()
    assert [poller.wait(30) for poller in pollers] == [0, 0]
    assert set(queue.all().values()) == {'complete'}


def test_two_queues_of_a_host_are_never_on_the_same_gpu(gpus, tmp_path):
    queues = [Queue(tmp_path / name) for name in ('q1', 'q2')]
    held = tmp_path / 'held'
    held.mkdir()
    for queue in queues:
        for n in range(12):
            body = 'mkdir $FASTGPU_ID || exit 1; sleep 0.02; rmdir $FASTGPU_ID'
            queue.add(f'{n}.sh', f'cd {shlex.quote(str(held))}; {body}')
    pollers = [queue.start('--exit', '1') for queue in queues]
    assert [poller.wait(60) for poller in pollers] == [0, 0]
    for queue in queues:
        assert set(queue.all().values()) == {'complete'}
        assert {queue.record(name)['ids'][0] for name in queue.all()} <= {0, 1}


@pytest.mark.parametrize('kind', ['worker', 'gpu'])
def test_what_a_script_has_stays_taken_when_its_poller_is_killed(gpus, queue, kind):
    gpus.have(1)
    args = ('--workers', '1') if kind == 'worker' else ('--exit', '1')
    other = queue if kind == 'worker' else Queue(queue.path.parent / 'other')
    other.change(LOOK_AROUND=0.2)
    queue.add('a.sh', queue.gate())
    kill_holding(queue.start(*args), queue, 'a.sh', queue.path if kind == 'worker' else gpus.locks)
    other.add('b.sh')
    second = other.start(*args)
    until(lambda: f'{kind} 0 busy: runs a.sh of yours (pid ' in second.log())
    assert queue.all() | other.all() == {'a.sh': 'running', 'b.sh': 'to_run'}
    queue.open_gate()
    assert second.wait(30) == 0
    ended = (queue.path / 'out' / 'a.sh.exitcode').stat().st_mtime
    assert other.record('b.sh')['started'] >= ended - 0.02  # as coarse is the clock of a file system


def test_a_poller_without_stdin_stdout_and_stderr_hands_its_locks_down(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', queue.gate())
    command = shlex.join([*COMMAND, '--workers', '1', '--path', str(queue.path)])
    command = f'exec {command} <&- >&- 2>&-'
    first = subprocess.Popen(['/bin/sh', '-c', command])
    queue.pollers.append(first)
    kill_holding(first, queue, 'a.sh', queue.path)
    queue.add('b.sh')
    second = queue.start('--workers', '1')
    until(lambda: 'worker 0 busy: runs a.sh' in second.log())
    queue.let_look(second)
    queue.open_gate()
    assert second.wait(30) == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}


def test_ctrl_c_in_the_middle_of_a_start_from_python_leaves_the_slot_to_the_script(queue, monkeypatch):
    monkeypatch.setattr(fastgpu, 'LOOK_AROUND', 0.2)
    queue.add('a.sh', queue.gate())
    queue.add('b.sh')
    pool = FixedWorkerPool([0], queue.path)
    popen = subprocess.Popen.__init__

    def interrupted(*args, **kwargs):
        popen(*args, **kwargs)
        raise KeyboardInterrupt

    subprocess.Popen.__init__ = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.poll_scripts()
    finally:
        subprocess.Popen.__init__ = popen
    assert pool.lock_next() is None
    queue.open_gate()
    assert pool.poll_scripts() == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}


def test_a_slot_is_free_only_when_all_that_a_cancelled_script_started_is_gone(queue):
    queue.change(LOOK_AROUND=0.2)
    # So much memory takes a while to be given back, and only then is the file closed.
    child = ('import signal; signal.signal(15, signal.SIG_IGN)\n'
             'memory = b"x" * (400 << 20); print("ready", flush=True); signal.pause()')
    queue.add('a.sh', f"trap 'exit 9' TERM; exec 9>{queue.q}/held; flock 9; '{sys.executable}' -c '{child}' & wait")
    queue.add('b.sh', f'exec 9>{queue.q}/held; flock -n 9')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    (queue.path / 'running' / 'a.sh').unlink()
    assert poller.wait(30) == 0
    assert queue.all() == {'b.sh': 'complete'}


@pytest.mark.skipif(os.getuid() != 0, reason='only root can try it as somebody else')
def test_no_other_user_can_free_a_gpu_or_make_us_write_to_our_own_files(tmp_path):
    with tempfile.TemporaryDirectory() as path:  # tmp_path is hidden from others
        os.chmod(path, 0o1777)
        lock = Path(path) / 'fastgpu-X.lock'
        fd = take_lock(lock)
        attack = f"""
import fcntl, os, struct, sys
os.setgid(65534); os.setuid(65534)
def lock(kind):
    whole = struct.pack('hhqqi', kind, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(os.open({str(lock)!r}, os.O_RDWR), fcntl.F_OFD_SETLK, whole)
for attempt in (lambda: os.unlink({str(lock)!r}), lambda: os.rename({str(lock)!r}, {str(lock)!r} + '2'),
                lambda: os.chmod({str(lock)!r}, 0),
                lambda: lock(fcntl.F_WRLCK), lambda: lock(fcntl.F_RDLCK),
                lambda: fcntl.lockf(os.open({str(lock)!r}, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)):
    try:
        attempt()
    except OSError:
        continue
    sys.exit('it worked')
lock(fcntl.F_UNLCK)
fcntl.lockf(os.open({str(lock)!r}, os.O_RDWR), fcntl.LOCK_UN)
open({str(lock)!r}, 'w').write(chr(27) + '[2J' + 'nobody uses this')
"""
        subprocess.run([sys.executable, '-c', attack], check=True)
        assert take_lock(lock) is None
        assert why_locked(lock) == r'busy: \x1b[2Jnobody uses this'
        os.close(fd)
        os.chown(lock, 65534, 65534)  # a file that another user made is as good
        os.chmod(lock, 0o666)
        fd = take_lock(lock)
        assert fd is not None
        os.close(fd)


def test_a_gpu_has_one_lock_whatever_its_number_is_for_whom(gpus, tmp_path, monkeypatch):
    gpus.have(2)
    mine = ResourcePoolGPU(tmp_path / 'q1')
    assert mine.lock(1)
    gpus.set(gpus.gpus[1])  # a container that sees the second GPU alone
    assert ResourcePoolGPU(tmp_path / 'q2').find_next() is None
    mine.unlock(1)
    assert ResourcePoolGPU(tmp_path / 'q2').find_next() == 0


def test_run_refuses_a_gpu_that_another_poller_asks_for(gpus, queue):
    queue.add('a.sh')
    pool = ResourcePoolGPU(queue.path)
    place = pool.place(0)
    asking = fastgpu.open_lock(place.path)
    assert place.asking.lock(asking)
    with pytest.raises(FastgpuError, match='gpu 0 busy'):
        pool.run('a.sh', 0)
    os.close(asking)
    assert pool.run('a.sh', 0)


def test_pollers_with_another_number_per_gpu_exclude_each_other(gpus, tmp_path):
    gpus.have(1)
    gpus.change(0, total=10240)
    one, two, four = (ResourcePoolGPU(tmp_path / f'q{n}', per_gpu=n) for n in (1, 2, 4))
    assert one.lock_next() == 0
    assert (two.lock_next(), four.lock_next()) == (None, None)
    one.unlock(0)
    assert two.lock_next() == 0
    assert one.lock_next() is None
    assert re.fullmatch(rf'busy: a lock of yours \(pid {os.getpid()}, .*\)', one.reasons[0])
    gpus.change(0, used=7000)
    assert two.lock_next() is None
    assert four.lock_next() == '0.1'
    two.unlock(0)
    four.unlock('0.1')
    assert four.lock_next() is None  # the first one again, and 7000 MiB are in use
    gpus.change(0, used=0)
    assert one.lock_next() == 0


def test_who_only_asks_does_not_make_a_busy_gpu_seem_shared(gpus, tmp_path):
    gpus.set({'uuid': A, 'total': 10240, 'used': 3000})
    class Asking(ResourcePoolGPU):
        def is_available(self, ident):
            return while_asked.append(other.lock_next())

    asking, other = (kind(tmp_path / f'q{n}', per_gpu=2) for n, kind in enumerate((Asking, ResourcePoolGPU)))
    while_asked = []
    assert asking.lock_next() is None
    assert while_asked == [None]


def test_no_query_can_make_a_gpu_without_scripts_seem_shared(gpus, tmp_path):
    gpus.set({'uuid': A, 'total': 10240})
    class Asking(ResourcePoolGPU):
        def is_available(self, ident):  # meanwhile the script ends and somebody else comes
            first.unlock(0)
            gpus.change(0, used=3000, pids=[4121])
            got.append(late.lock_next())

    first, late = (ResourcePoolGPU(tmp_path / f'q{n}', per_gpu=3) for n in range(2))
    assert first.lock_next() == 0
    got = []
    assert Asking(tmp_path / 'q', per_gpu=3).lock_next() is None
    assert {*got, late.lock_next()} == {None}


def test_a_gpu_on_which_our_own_script_left_a_process_is_not_handed_to_the_next(gpus, queue):
    queue.change(LINGER=0.5, LOOK_AROUND=0.2)
    gpus.have(1)
    queue.add('a.sh', queue.gate())
    queue.add('b.sh')
    poller = queue.start('--exit', '1')
    until(lambda: queue.names('running') == ['a.sh'])
    gpus.change(0, pids=[2**22 + 1])
    queue.open_gate()
    until(lambda: f'used by pid {2**22 + 1}' in poller.log())
    until(lambda: 'complete a.sh' in poller.log())  # collected after the next one was tried
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'to_run'}
    gpus.change(0, pids=[])
    assert poller.wait(30) == 0


def test_a_gpu_on_which_a_script_left_something_rests_until_that_would_be_seen(gpus, queue, monkeypatch, capsys):
    gpus.have(1)
    monkeypatch.setattr(fastgpu, 'SHOWS', 1.0)
    queue.add('a.sh', f'({queue.gate()}) & echo $!')
    queue.add('b.sh', 'sleep 0.1')  # which ends in between on the same GPU
    queue.add('c.sh')
    assert ResourcePoolGPU(queue.path, per_gpu=2).poll_scripts() == 0
    log = capsys.readouterr().err
    pid = int(queue.out('a.sh.stdout'))
    assert re.search(rf'gpu 0: a.sh left something running \(pid (\d+, )?{pid}(, \d+)?\): let the script ', log)
    assert 'gpu 0 busy: a.sh left something running: waiting 1 s to see whether that uses it' in log
    assert pid in queue.record('a.sh')['left_behind']
    assert queue.record('c.sh')['started'] - queue.record('a.sh')['finished'] > 0.9
    assert 'left_behind' not in queue.record('b.sh')
    queue.open_gate()


# --- Rule 4: killing the poller kills no work -------------------------------------------------------------------------

def test_kill_9_of_the_poller_kills_no_work_and_the_next_one_collects_it(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('ends-well.sh', queue.gate('one') + 'echo well')
    queue.add('fails.sh', queue.gate('one') + 'echo bad; exit 7')
    queue.add('runs-on.sh', queue.gate('two') + 'echo on; exit 8')
    queue.add('waits.sh', 'echo waited')
    first = queue.start('--workers', '3')
    until(lambda: len(queue.names('running')) == 3 and all('pid' in queue.record(n) for n in queue.names('running')))
    kill(first)
    queue.open_gate('one')
    until(lambda: queue.has_out('ends-well.sh.exitcode') and queue.has_out('fails.sh.exitcode'))
    assert len(queue.names('running')) == 3
    second = queue.start('--workers', '3')
    until(lambda: queue.all() == {'ends-well.sh': 'complete', 'fails.sh': 'fail', 'runs-on.sh': 'running',
                                  'waits.sh': 'complete'})
    until(lambda: 'waiting for runs-on.sh, which runs without this poller' in second.log())
    assert second.poll() is None
    queue.open_gate('two')
    assert second.wait(30) == 1
    assert queue.all()['runs-on.sh'] == 'fail'
    assert [queue.out(f'{name}.sh.exitcode') for name in ('ends-well', 'fails', 'runs-on')] == ['0', '7', '8']
    assert queue.out('runs-on.sh.stdout') == 'on\n'
    record = queue.record('runs-on.sh')
    assert record['exitcode'] == 8
    assert abs(record['finished'] - (queue.path / 'out' / 'runs-on.sh.exitcode').stat().st_mtime) < 1


def test_hup_of_the_poller_kills_no_work(queue):
    queue.add('a.sh', 'echo ready; ' + queue.gate() + 'echo end')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    poller.send_signal(signal.SIGHUP)
    assert poller.wait(30) == -signal.SIGHUP
    queue.open_gate()
    until(lambda: queue.has_out('a.sh.exitcode'))
    assert queue.out('a.sh.stdout') == 'ready\nend\n'


def test_pkill_of_fastgpu_ends_the_poller_and_no_script(queue):
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '1')
    file = Path(f'/proc/{queue.pid("a.sh")}/cmdline')
    command = until(file.read_bytes).replace(os.fsencode(queue.path), b'')  # it is empty in the middle of an exec
    assert b'_job_status' in command
    assert b'fastgpu' not in command
    poller.kill()


def test_term_to_its_group_does_not_cost_a_script_its_status(queue):
    queue.add('a.sh', TRAP.format(6))
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout') and 'pid' in queue.record('a.sh'))
    kill(poller)
    os.killpg(queue.pid('a.sh'), signal.SIGTERM)
    until(lambda: queue.has_out('a.sh.exitcode'))
    assert queue.out('a.sh.exitcode') == '6'


def test_resources_that_json_does_not_know_are_collected_by_the_next_poller_too(queue):
    queue.add('a.sh', queue.gate())
    api = 'import fastgpu; fastgpu.FixedWorkerPool([("host", 1)], ".").poll_scripts()'
    first = subprocess.Popen([sys.executable, '-c', api], cwd=queue.path,
                             env={**os.environ, 'PYTHONPATH': str(MODULE.parent)})
    queue.pid('a.sh')
    kill(first)
    queue.open_gate()
    assert queue.poll()[0] == 0
    assert queue.all() == {'a.sh': 'complete'}


def test_a_container_that_is_started_anew_under_another_name_collects_what_ended(queue):
    quick = poller_with(LOOK_AROUND=0.2)
    queue.add('ended.sh', queue.gate('end') + 'exit 3')
    queue.add('runs.sh', queue.gate())
    first = queue.start('--workers', '2', command=on_host('before', command=quick))
    for name in 'ended.sh', 'runs.sh':
        queue.pid(name)
    kill(first)
    queue.open_gate('end')
    second = queue.start('--workers', '2', command=on_host('after', command=quick))
    until(lambda: 'waiting for runs.sh, which runs without this poller' in second.log())
    assert queue.all() == {'ended.sh': 'fail', 'runs.sh': 'running'}
    queue.open_gate()
    assert second.wait(30) == 1
    assert queue.all() == {'ended.sh': 'fail', 'runs.sh': 'complete'}


# --- Rule 5: nothing goes stale ---------------------------------------------------------------------------------------

def test_after_a_reboot_what_ended_is_collected_and_what_was_cut_off_runs_again(queue):
    queue.add('cut.sh', f'echo run >> {queue.q}/ran; ' + queue.gate('never'))
    queue.add('ended.sh', queue.gate() + 'exit 4')
    first = queue.start('--workers', '2')
    until(lambda: (queue.path / 'ran').exists() and queue.names('running') == ['cut.sh', 'ended.sh'])
    queue.pid('cut.sh')
    queue.pid('ended.sh')
    first.send_signal(signal.SIGSTOP)
    queue.open_gate()
    until(lambda: queue.has_out('ended.sh.exitcode'))
    kill(first)
    os.killpg(queue.pid('cut.sh'), signal.SIGKILL)
    assert queue.all() == {'cut.sh': 'running', 'ended.sh': 'running'}
    queue.open_gate('never')
    assert queue.poll()[0] == 1
    assert queue.all() == {'cut-1.sh': 'complete', 'ended.sh': 'fail'}
    assert (queue.path / 'ran').read_text() == 'run\nrun\n'


def test_what_a_host_that_crashed_had_started_is_cut_off_though_its_pid_reached_no_record(queue):
    queue.add('a.sh').rename(queue.path / 'running' / 'a.sh')
    record = {'script': 'a.sh', **fastgpu.this_host(), 'boot': 'before', 'ids': [0], 'started': 1.0}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    status, log = queue.poll()
    assert (status, queue.all()) == (0, {'a-1.sh': 'complete'})
    assert 'requeue a.sh (cut off, ' in log


@pytest.mark.parametrize(('change', 'folder'), [
    ({'boot': 'before'}, 'complete'), ({'boot': 'before', 'host': 'old-name'}, 'running'),
    ({'boot': 'theirs', 'machine': 'theirs'}, 'running'), ({'boot': 'theirs', 'machine': ''}, 'running'),
    ({'host': 'old-name', 'machine': 'theirs'}, 'complete')])
def test_a_run_is_of_the_kernel_that_started_it_or_of_this_machine_before_its_reboot(queue, change, folder):
    if not fastgpu.this_host()['machine']:
        pytest.skip('has no machine-id(5)')
    queue.add('a.sh').rename(queue.path / 'running' / 'a.sh')
    record = {'script': 'a.sh', **fastgpu.this_host(), 'ids': [0], 'started': 1.0, 'pid': 2**22 + 1, **change}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    (queue.path / 'out' / 'a.sh.stdout').touch()
    status, log = queue.poll()
    assert status == 0
    assert queue.all() == {'a.sh' if folder == 'running' else 'a-1.sh': folder}
    assert ('if no fastgpu_poll will run there again: mv ' in log) == (folder == 'running')


def test_an_ended_script_whose_daemon_holds_its_locks_is_collected_and_its_slot_is_free(queue):
    queue.add('a.sh', f'({queue.gate()}) & echo started')
    queue.add('b.sh')
    assert queue.poll('--workers', '1')[0] == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}
    assert FixedWorkerPool([0], queue.path).find_next() == 0


def test_a_daemon_of_an_earlier_script_does_not_hold_the_lock_of_a_later_one(queue):
    queue.add('a.sh', f'({queue.gate()}) &')
    queue.add('b.sh', f'echo; {queue.gate("second")}')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('b.sh.stdout'))
    kill(poller)
    queue.open_gate('second')
    until(lambda: queue.has_out('b.sh.exitcode'))
    until(lambda: FixedWorkerPool([0], queue.path).find_next() == 0)
    queue.open_gate()


def test_a_dead_pollers_ended_script_is_collected_though_its_daemon_lives(queue):
    queue.change(OVERDUE=0.3, LOOK_AROUND=0.2)
    queue.add('a.sh', queue.gate('one') + f'({queue.gate()}) & exit 5')
    first = queue.start('--workers', '1')
    until(lambda: queue.names('running') == ['a.sh'] and 'pid' in queue.record('a.sh'))
    kill(first)
    queue.open_gate('one')
    assert queue.poll('--workers', '1')[0] == 1
    assert queue.all() == {'a.sh': 'fail'}


def test_a_slot_is_not_held_after_an_interrupt_between_its_lock_and_the_start(queue):
    class Interrupted(fastgpu.Claims):
        def take_some(self, number, script):
            super().take_some(number, script)
            raise KeyboardInterrupt

    queue.add('a.sh')
    pool = FixedWorkerPool([0], queue.path)
    pool.claims = Interrupted(pool)
    with pytest.raises(KeyboardInterrupt):
        pool.poll_scripts()
    assert FixedWorkerPool([0], queue.path).lock_next() == 0
    assert queue.all() == {'a.sh': 'to_run'}


@pytest.mark.parametrize('jump', [-7200, 7200])
def test_a_clock_that_jumps_costs_nothing(queue, monkeypatch, jump):
    now, began = time.time, time.monotonic()
    monkeypatch.setattr(time, 'time', lambda: now() + (jump if time.monotonic() > began + 0.3 else 0))
    for n in range(6):
        queue.add(f'{n}.sh', 'sleep 0.1')
    assert FixedWorkerPool([0], queue.path).poll_scripts() == 0
    assert len(queue.names('complete')) == 6


# --- Rule 6: fail closed, and say why: scripts and folders ------------------------------------------------------------

def test_what_is_not_executable_waits_and_is_named_once_and_at_exit(queue):
    queue.add('a.sh', mode=0o644)
    queue.add('b.sh', 'sleep 0.3')
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == {'a.sh': 'to_run', 'b.sh': 'complete'}
    assert log.count('to_run/a.sh waits for its chmod +x') == 1
    assert 'left in to_run: a.sh (waits for its chmod +x)' in log


def test_what_is_said_of_a_script_and_of_a_run_of_its_name_is_said_once(queue, capsys):
    queue.add('a.sh', mode=0o644)
    queue.add('b.sh').rename(queue.path / 'running' / 'a.sh')
    pool = FixedWorkerPool([0], queue.path)
    for _ in range(3):
        assert pool.poll_scripts() == 1
    log = capsys.readouterr().err
    assert log.count('has no record in out') == log.count('to_run/a.sh waits for its chmod +x') == 1


def test_a_name_that_came_before_is_named_anew(queue):
    script = queue.add('a.sh', mode=0o644)
    poller = queue.start('--exit', '0', '--workers', '1')
    until(lambda: poller.log().count('to_run/a.sh waits for its chmod +x') == 1)
    script.chmod(0o755)
    until(lambda: queue.names('complete') == ['a.sh'])
    queue.add('a.sh', mode=0o644)
    until(lambda: poller.log().count('to_run/a.sh waits for its chmod +x') == 2)


def test_an_empty_file_is_not_ready(queue):
    script = queue.add('a.sh', head='')
    script.write_text('')
    os.utime(script, (1, 1))
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == {'a.sh': 'to_run'}
    assert 'to_run/a.sh cannot run: empty\n' in log


def test_a_link_that_leads_nowhere_is_named_and_left(queue):
    (queue.path / 'to_run' / 'a.sh').symlink_to('nowhere')
    queue.add('b.sh')
    status, log = queue.poll(cwd=queue.path)
    assert status == 1
    assert 'to_run/a.sh cannot run: a link that leads nowhere\n' in log
    assert 'left in to_run: a.sh (a link that leads nowhere)\n' in log
    assert queue.all() == {'a.sh': 'to_run', 'b.sh': 'complete'}


def test_a_name_too_long_for_its_exitcode_stays_and_is_named(queue):
    most = os.pathconf(queue.path, 'PC_NAME_MAX')
    fits, too_long = 'f' * (most - len('.exitcode')), 'e' * (most - len('.exitcode') + 1)
    queue.add(too_long)
    queue.add(fits)
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == {too_long: 'to_run', fits: 'complete'}
    assert log.count('its name is too long, by 1 bytes') == 2
    assert queue.names('out') == [f'{fits}.{kind}' for kind in ('exitcode', 'json', 'stderr', 'stdout')]


def test_a_script_that_cannot_be_moved_stays_and_the_others_run(queue):
    if os.getuid() or not shutil.which('chattr'):
        pytest.skip('needs root and chattr')
    script = queue.add('a.sh')
    queue.add('b.sh')
    if subprocess.run(['chattr', '+i', script], check=False, capture_output=True).returncode:
        pytest.skip('no immutable files here')
    try:
        status, log = queue.poll('--workers', '1')
    finally:
        subprocess.run(['chattr', '-i', script], check=True)
    assert status == 1
    assert queue.all() == {'a.sh': 'to_run', 'b.sh': 'complete'}
    assert 'left in to_run: a.sh (it cannot be moved: Operation not permitted)' in log


@pytest.mark.parametrize('kind', ['folder', 'fifo', 'link'])
def test_one_odd_file_does_not_stop_the_others(queue, kind):
    for name in 'a.sh', 'b.sh':
        queue.add(name)
    os.rename(queue.path / 'to_run' / 'a.sh', queue.path / 'running' / 'a.sh')
    record = queue.path / 'out' / 'a.sh.json'
    {'folder': Path.mkdir, 'fifo': os.mkfifo, 'link': lambda path: path.symlink_to('/etc/passwd')}[kind](record)
    status, log = queue.poll()
    assert status == 1  # it was left behind
    assert queue.all() == {'a.sh': 'running', 'b.sh': 'complete'}
    assert 'running/a.sh has no record in out; if nothing runs it: mv ' in log


def test_a_record_with_a_name_that_no_file_can_have_goes_to_fail_and_is_named(queue):
    queue.add('a.sh').rename(queue.path / 'running' / 'a.sh')
    record = {'script': 'x' * 300, **fastgpu.this_host(), 'ids': [0], 'started': 1.0, 'pid': 2**22 + 1}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    status, log = queue.poll()
    assert status == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert 'fail a.sh (cut off, and its record has a name that no file can have' in log


def test_words_of_a_record_that_somebody_edited_do_no_harm(queue):
    queue.add('a.sh').rename(queue.path / 'running' / 'a.sh')
    record = {'script': 'a.sh', **fastgpu.this_host(), 'ids': [0], 'started': 1.0, 'kind': 7, 'left_behind': 5}
    (queue.path / 'out' / 'a.sh.json').write_text(json.dumps(record))
    (queue.path / 'out' / 'a.sh.exitcode').write_text('0')
    assert queue.poll()[0] == 0
    assert queue.all() == {'a.sh': 'complete'}


def test_a_poller_in_a_script_of_its_own_queue_is_refused(queue):
    command = shlex.join([*COMMAND, '--workers', '2', '--path', str(queue.path)])
    queue.add('a.sh', command)
    status, log = queue.poll('--workers', '1')
    assert status == 1
    assert 'fail a.sh (status 2, ' in log
    assert 'this runs in a script of the same queue, and would wait for itself: use another --path' in log


def test_why_a_first_line_made_a_script_fail_is_said_and_what_to_put_there(queue):
    heads = {
        'none': ('', 'it has no #! line, so /bin/sh ran it: for Python, begin it with #!/usr/bin/env python3'),
        'windows': ('#!/bin/sh\r\n', "it has the line ends of Windows: sed -i 's/\\r$//' {fail} mends that"),
        'env': ('#!/usr/bin/env python3\r\n', "it has the line ends of Windows: sed -i 's/\\r$//' {fail} mends that"),
        'path': ('#!python3\n', 'its #! line needs a path: #!/usr/bin/env python3'),
        'mark': ('\ufeff#!/bin/sh\n', 'a byte order mark stands before its #!: save it without one'),
        'missing': ('#!/no/such/python3 -u\n', 'its interpreter /no/such/python3 does not exist'),
        'good': ('#!/bin/sh\n', '.*no-such-command: not found')}
    for name, (head, _) in heads.items():
        queue.add(name, 'no-such-command (\n' if head == '' else 'no-such-command', head=head)
    status, log = queue.poll()
    assert (status, queue.all()) == (1, dict.fromkeys(heads, 'fail'))
    for name, (_, said) in heads.items():
        fail = queue.path / 'fail' / name
        said = said if said[0] == '.' else re.escape(said.format(fail=shlex.quote(str(fail))))
        line = re.search(rf'fail {name} \(status \d+, \d.\d s\): {said} \(.*', log)
        assert line, (name, log)
        if 'sed' in said:
            command = re.search(r'sed .*?(?= mends that)', line[0])[0]
            subprocess.run(command, shell=True, check=True)
            assert b'\r' not in fail.read_bytes()


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_a_folder_that_cannot_be_read_for_a_while_is_said_and_looked_at_again(queue, tmp_path, number):
    queue.change(LOOK_AROUND=0.1)
    env, away, times = failing(tmp_path, 'listdir', 'running', number)
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '1', env=env)
    queue.pid('a.sh')
    away.touch()
    said = f'cannot see the queue now: {queue.path}/running: {os.strerror(number)}; trying again'
    until(lambda: said in poller.log() and times() > 3)
    queue.open_gate()
    until(lambda: queue.names('complete') == ['a.sh'])  # which needs no look there
    assert poller.poll() is None
    away.unlink()
    assert poller.wait(30) == 0
    assert poller.log().count('cannot see') == 1


def test_a_script_whose_file_cannot_be_seen_for_a_while_is_not_cancelled(queue, tmp_path):
    queue.change(LOOK_AROUND=0.1)
    env, away, times = failing(tmp_path, 'lstat', 'running/a.sh')
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '1', env=env)
    queue.pid('a.sh')
    away.touch()
    until(lambda: times() > 3)
    away.unlink()
    queue.open_gate()
    assert poller.wait(30) == 0
    assert 'cancel' not in poller.log()


@pytest.mark.parametrize(('call', 'where', 'said'), [
    ('stat', 'to_run/a.sh', ''), ('open', 'out/b.sh.json', 'cannot collect b.sh now: '),
    ('stat', 'out/a.sh.json', 'cannot start a.sh now: ')])
def test_one_failed_look_at_a_file_is_no_verdict_on_it(queue, tmp_path, call, where, said):
    queue.change(LOOK_AROUND=0.2)
    env, away, times = failing(tmp_path, call, where)
    queue.add('b.sh', queue.gate())
    first = queue.start('--workers', '2')
    queue.pid('b.sh')
    kill(first)
    second = queue.start('--workers', '2', env=env)
    until(lambda: 'waiting for b.sh' in second.log())
    away.touch()
    queue.add('a.sh')
    if said:
        until(lambda: said in second.log())
    else:
        queue.open_gate()
        until(lambda: queue.names('complete') == ['b.sh'])
    looked = times()
    until(lambda: times() > looked + 2)
    assert second.poll() is None
    assert 'mv ' not in second.log()
    away.unlink()
    queue.open_gate()
    assert second.wait(30) == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}
    assert queue.names('out') == sorted(f'{n}.{kind}' for n in ('a.sh', 'b.sh')
                                        for kind in ('exitcode', 'json', 'stderr', 'stdout'))


@pytest.mark.parametrize('plant', [lambda path: path.symlink_to(path.parent / 'precious'), os.mkfifo])
def test_what_is_planted_where_the_clock_is_does_no_harm(queue, plant):
    (queue.path / 'precious').write_text('precious')
    plant(queue.path / f'.{os.uname().nodename}.clock')
    os.utime(queue.add('a.sh'))
    assert queue.poll()[0] == 0
    assert (queue.path / 'precious').read_text() == 'precious'


# --- Rule 6: fail closed, and say why: GPUs ---------------------------------------------------------------------------

@pytest.mark.parametrize(('state', 'free'), [
    ({'pids': [4121]}, False), ({'used': 1024}, True), ({'used': 1025}, False), ({'memory': 15}, False),
    ({'processes': 15}, False), ({'grows': True}, False)])
def test_a_gpu_is_free_without_processes_and_up_to_1024_mib_and_busy_in_doubt(gpus, queue, state, free):
    pool = ResourcePoolGPU(queue.path)
    gpus.change(0, **state)
    assert pool.is_available(0) == free
    assert pool.lock_next() == (0 if free else 1)


def test_max_used_is_an_option(gpus, queue):
    gpus.have(1)
    gpus.change(0, used=2000)
    queue.add('a.sh')
    assert queue.poll('--max-used', '2000')[0] == 0
    assert queue.all() == {'a.sh': 'complete'}


def test_why_a_script_waits_is_logged_once_per_change_with_a_line_per_gpu(gpus, queue):
    queue.change(LOOK_AROUND=0.2)
    gpus.have(4)
    me = f'pid {os.getpid()} ({Path("/proc/self/comm").read_text().strip()} of {USER})'
    gpus.gpus[0].update(used=23654, pids=[os.getpid(), 2**22 + 1])
    gpus.gpus[1].update(memory=15)
    gpus.gpus[2].update(used=1100)
    gpus.gpus[3].update(grows=True)
    gpus.save()
    queue.add('a.sh')
    poller = queue.start('--exit', '1')
    for line in (f'gpu 0 busy: 23.1 GiB used by {me}, pid {2**22 + 1}', 'gpu 1 unusable: GPU is lost',
                 'gpu 2 busy: 1.1 GiB used by no compute process; free is up to 1.0 GiB',
                 'gpu 3 unusable: Insufficient Size'):
        until(lambda line=line: f'{line}\n' in poller.log(), line)
    asked = len(gpus.calls('memory'))
    gpus.change(0, used=24000)
    until(lambda: len(gpus.calls('memory')) > asked + 8)  # each of them once more
    gpus.change(0, used=900, pids=[2**22 + 2])
    until(lambda: re.search(f'gpu 0 busy: .* used by pid {2**22 + 2}\n', poller.log()))
    assert len(re.findall(' gpu ', poller.log())) == 5
    gpus.have(4)
    assert poller.wait(30) == 0
    assert ' gpu 0: start a.sh' in poller.log()


def test_the_log_of_who_waits_tells_who_has_a_gpu_once_a_minute(queues):
    for n in range(12):
        queues[0].add(f'{n:02}', 'sleep 0.01')
        queues[1].add(f'{n:02}', 'sleep 0.01')
    pollers = [queue.start('--exit', '1') for queue in queues[:2]]
    assert [poller.wait(60) for poller in pollers] == [0, 0]
    for poller in pollers:
        assert len(re.findall('gpu 0 busy', poller.log())) <= 1


def test_the_memory_of_a_script_that_just_ended_is_no_news(gpus, queue):
    queue.change(LINGER=2, LOOK_AROUND=0.2)
    gpus.have(1)
    for name in 'ab':
        queue.add(name, queue.gate(name))
    poller = queue.start('--exit', '1')
    queue.pid('a')
    gpus.change(0, used=52000)  # what is still held when a killed one is gone
    queue.open_gate('a')
    until(lambda: queue.names('complete') == ['a'])
    asked = len(gpus.calls('memory'))
    until(lambda: len(gpus.calls('memory')) > asked + 1)
    assert 'busy' not in poller.log()
    until(lambda: 'gpu 0 busy: 50.8 GiB used by no compute process' in poller.log())
    gpus.change(0, used=500)
    queue.open_gate('b')
    assert poller.wait(30) == 0


def test_a_lock_file_of_gpus_is_told_but_not_trusted(gpus, queue):
    lock = gpus.locks / f'fastgpu-{gpus.gpus[0]["uuid"]}.lock'
    lock.write_bytes(b'\x1b[31mrun\xff' + b'x' * 10000)
    queue.add('a.sh')
    pool = ResourcePoolGPU(queue.path)
    with open(lock, 'r+') as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert pool.lock_next() == 1
        assert pool.reasons[0].startswith(r'busy: \x1b[31mrun')
        assert len(pool.reasons[0]) < 300
    assert pool.find_next() == 0


@pytest.mark.parametrize('note', [b'runs a\0b of x (pid 1, /t)', b'\xff' * 300, b'runs \xed\xb2\x80 of y (pid 1, /x)'])
def test_no_note_of_another_user_is_more_than_a_text(gpus, queue, note):
    path = ResourcePoolGPU(queue.path).place(0).path
    fd = fastgpu.open_lock(path)
    assert fastgpu.Place(path).lock(fd)
    os.pwrite(fd, note, 0)
    assert 'busy' in status(queue)[1]
    os.close(fd)


@pytest.mark.parametrize('plant', [lambda path: path.symlink_to('/etc/passwd'), os.mkfifo, Path.mkdir])
def test_a_lock_that_is_not_one_makes_its_gpu_unusable_and_not_the_others(gpus, queue, plant):
    plant(gpus.locks / f'fastgpu-{gpus.gpus[0]["uuid"]}.lock')
    pool = ResourcePoolGPU(queue.path)
    assert pool.lock_next() == 1
    assert pool.reasons[0].startswith('unusable: ')
    assert re.search('^gpu 0 .* unusable: .*\ngpu 1 ', status(queue)[1])


def test_why_a_gpu_of_a_poller_that_stands_still_is_busy(gpus, tmp_path):
    gpus.have(1)
    first, second = Queue(tmp_path / 'one'), Queue(tmp_path / 'two')
    first.add('a.sh', first.gate())
    stopped = first.start('--exit', '1')
    first.pid('a.sh')
    stopped.send_signal(signal.SIGSTOP)
    first.open_gate()
    until(lambda: first.has_out('a.sh.exitcode'))
    os.utime(first.path / 'out' / 'a.sh.exitcode', (time.time() - 600,) * 2)
    second.add('b.sh')
    waiting = second.start('--exit', '1')
    until(lambda: re.search(r'gpu 0 busy: runs a.sh of yours \(pid \d+, .*/one\), which ended 0:10:0\d ago: its poller '
                            r'stands still \(Ctrl-Z\?\), or a daemon of it lives\n', waiting.log()))
    stopped.send_signal(signal.SIGCONT)
    assert (stopped.wait(30), waiting.wait(30)) == (0, 0)
    for queue in first, second:
        for poller in queue.pollers:
            poller.wait()


def test_who_stands_still_while_he_asks_the_driver_is_told_to_others(gpus, queues):
    place = ResourcePoolGPU(queues[1].path).place(0)
    fd = fastgpu.open_lock(place.path)
    assert place.asking.lock(fd)
    queues[0].change(OVERDUE=0.3)
    queues[0].add('a')
    poller = queues[0].start('--exit', '1')
    said = f'gpu 0 busy: another poller asks the driver, without an answer (fuser -v {place.path})'
    until(lambda: said in poller.log())
    os.close(fd)
    assert poller.wait(30) == 0


def test_a_script_that_asks_for_more_gpus_than_there_are_stays_and_says_so(gpus, queue):
    queue.add('a.sh', '#SBATCH -G 5')
    queue.add('b.sh', '#SBATCH -G two')
    queue.add('c.sh', '#SBATCH -G ' + 5000 * '9')
    queue.add('d.sh')
    status, log = queue.poll('--exit', '1')
    assert status == 1
    assert queue.all() == {'a.sh': 'to_run', 'b.sh': 'to_run', 'c.sh': 'to_run', 'd.sh': 'complete'}
    assert 'to_run/a.sh cannot run: 5 gpus are needed, and there are only 2\n' in log
    assert 'left in to_run: a.sh (5 gpus are needed, and there are only 2)\n' in log
    assert 'left in to_run: b.sh (its line "#SBATCH -G two" does not say how many GPUs)' in log


def test_a_script_that_needs_more_gpus_than_can_be_used_now_says_so(gpus, queue):
    queue.change(LOOK_AROUND=0.2)
    gpus.change(1, memory=15)
    queue.add('a.sh', '#SBATCH --gpus=2')
    poller = queue.start('--exit', '1')
    until(lambda: 'a.sh waits for 2 gpus at once (only 1 can be used now), and all behind it wait too' in poller.log())
    gpus.change(1, memory=0)
    assert poller.wait(30) == 0


def test_a_script_that_could_not_run_is_looked_at_again_when_it_has_changed(gpus, queue):
    queue.add('a.sh', '#SBATCH -G two')
    poller = queue.start('--exit', '0')
    until(lambda: 'to_run/a.sh cannot run: ' in poller.log())
    queue.add('a.sh', '#SBATCH -G 2')
    until(lambda: queue.names('complete') == ['a.sh'])


def test_a_gpu_on_which_three_scripts_in_a_row_fail_at_once_rests_and_its_neighbour_works(gpus, queue):
    for name in '1234567':
        queue.add(name, '[ $FASTGPU_ID = 1 ] && sleep 0.1 || exit 3')
    log = queue.poll('--exit', '1')[1]
    assert len(queue.names('fail')) == 3
    assert len(queue.names('complete')) == 4
    names = ', '.join(sorted(queue.names('fail'), key=lambda name: queue.record(name)['finished']))
    assert re.search(f'gpu 0 busy: rests until ..:..:..: {names} failed in a row, each within 10 s \\(see their', log)
    assert log.index(f'fail {names.split(", ")[-1]}') < log.index('rests until'), 'the reason comes after its cause'
    assert log.count('rests until') == 1


def test_an_instance_with_a_slash_in_its_uuid_rests_too(gpus, queue):  # as drivers before 470 have them
    gpus.set({'uuid': B, 'mig': [{'uuid': f'MIG-{B}/1/0'}]})
    for name in '1234':
        queue.add(name, 'exit 1')
    poller = queue.start('--exit', '0')
    until(lambda: 'rests until' in poller.log())
    assert len(queue.names('fail')) == 3


def test_a_rest_is_seen_by_others_gets_longer_and_ends_with_a_script_that_works(gpus, queue, monkeypatch):
    gpus.have(1)
    now = [1000.0]
    monkeypatch.setattr(fastgpu.time, 'monotonic', lambda: now[0])
    pool, other = ResourcePoolGPU(queue.path), ResourcePoolGPU(queue.path)
    for name in 'ab':
        pool.note_end([0], name, True, False)
    pool.note_end([0], 'c', False, False)
    for name in 'def':
        assert pool.is_available(0)
        pool.note_end([0], name, True, False)
    assert not pool.is_available(0)
    assert not other.is_available(0)
    assert re.fullmatch('busy: rests until .*: d, e, f failed in a row, each within 10 s .see their .stderr in out.',
                        other.reasons[0])
    assert ': d, e, f failed in a row' in status(queue)[1]
    assert ResourcePoolGPU(queue.path.parent).is_available(0)  # a broken batch is no reason for other queues
    lengths = []
    for name in 'ghijklmn':
        began = now[0]
        while not pool.is_available(0):
            now[0] += 1
        lengths.append(now[0] - began)
        pool.note_end([0], name, True, False)
    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    now[0] += 3600
    assert pool.is_available(0)
    pool.note_end([0], 'o', False, False)
    pool.note_end([0], 'p', True, False)
    assert pool.is_available(0)
    several = ResourcePoolGPU(queue.path.parent, per_gpu=4)
    for name in 'abcdefgh':  # two batches of four at once
        several.note_end([several.all_ids()['abcdefgh'.index(name) % 4]], name, True, False)
        if name == 'd':
            now[0] += 61
            assert several.is_available(0)
    now[0] += 119
    assert not several.is_available(0)
    now[0] += 2
    assert several.is_available(0)


def test_slots_do_not_rest(queue):
    for name in '123456':
        queue.add(name, 'exit 3')
    assert 'rests' not in queue.poll('--workers', '1')[1]
    assert len(queue.names('fail')) == 6


# --- Rule 7: the folders stay true ------------------------------------------------------------------------------------

def test_mv_or_rm_of_a_running_script_cancels_it_and_leaves_the_file(queue):
    queue.change(LOOK_AROUND=0.2)
    for name in 'moved.sh', 'removed.sh':
        queue.add(name, f'echo ready >> {queue.q}/{name}; exec sleep 1000')
    poller = queue.start('--workers', '2', '--exit', '0')
    until(lambda: (queue.path / 'moved.sh').exists() and (queue.path / 'removed.sh').exists())
    os.rename(queue.path / 'running' / 'moved.sh', queue.path / 'moved-away.sh')
    (queue.path / 'running' / 'removed.sh').unlink()
    until(lambda: queue.record('moved.sh').get('finished') and queue.record('removed.sh').get('finished'))
    assert queue.record('moved.sh')['cancelled'] is True
    assert queue.out('removed.sh.exitcode') == '143'
    assert queue.all() == {}
    until(lambda: 'cancelled moved.sh (status 143, SIGTERM' in poller.log())
    queue.add('next.sh')
    until(lambda: queue.names('complete') == ['next.sh'])  # the slots are free again
    poller.send_signal(signal.SIGINT)
    assert poller.wait(30) == 130
    assert ' 3 scripts in ' in poller.log()
    assert ': 1 complete, 0 fail, 2 cancelled\n' in poller.log()


def test_mv_of_a_running_script_back_to_to_run_starts_it_anew_when_it_has_ended(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', 'trap "sleep 0.3; echo end; exit 1" TERM; echo start; while :; do sleep 0.01; done')
    poller = queue.start('--workers', '2')
    until(lambda: queue.has_out('a.sh.stdout'))
    held = FixedWorkerPool([0, 1], queue.path)
    os.rename(queue.path / 'running' / 'a.sh', queue.path / 'to_run' / 'a.sh')
    until(lambda: queue.has_out('a-1.sh.stdout'))
    assert queue.out('a.sh.stdout') == 'start\nend\n'
    assert queue.record('a-1.sh')['started'] >= queue.record('a.sh')['finished']
    os.unlink(queue.path / 'running' / 'a-1.sh')
    assert poller.wait(30) == 0
    assert held.find_next() == 0


def test_cancelling_works_for_the_script_of_a_dead_poller_too(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', 'echo ready; exec sleep 1000')
    first = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout') and 'pid' in queue.record('a.sh'))
    kill(first)
    second = queue.start('--workers', '1')
    until(lambda: 'waiting for a.sh, which runs without this poller' in second.log())
    os.rename(queue.path / 'running' / 'a.sh', queue.path / 'fail' / 'a.sh')
    assert second.wait(30) == 0
    assert queue.out('a.sh.exitcode') == '143'
    assert queue.record('a.sh')['cancelled'] is True
    assert queue.all() == {'a.sh': 'fail'}


def test_mv_back_from_fail_runs_again_and_keeps_both_outputs(queue):
    queue.add('a.sh', f'echo $$; [ -e {queue.q}/gate ]')
    assert queue.poll()[0] == 1
    os.rename(queue.path / 'fail' / 'a.sh', queue.path / 'to_run' / 'a.sh')
    queue.open_gate()
    assert queue.poll()[0] == 0
    assert queue.all() == {'a-1.sh': 'complete'}
    assert queue.out('a.sh.stdout') != queue.out('a-1.sh.stdout')
    assert (queue.out('a.sh.exitcode'), queue.out('a-1.sh.exitcode')) == ('1', '0')


def test_removing_from_out_and_complete_at_any_time_harms_nothing(queue):
    queue.add('done.sh')
    queue.poll()
    queue.add('a.sh', 'echo ready; ' + queue.gate() + 'exit 3')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout') and 'pid' in queue.record('a.sh'))
    for folder in 'out', 'complete':
        for name in queue.names(folder):
            (queue.path / folder / name).unlink()
    queue.open_gate()
    assert poller.wait(30) == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.out('a.sh.exitcode') == '3'


def test_files_of_others_in_out_are_left_alone(queue):
    out = queue.path / 'out'
    (out / 'metrics.json').write_text('{"loss": 0.1}')
    (out / 'records.json').write_text('[]')
    (out / 'folder.json').mkdir()
    os.mkfifo(out / 'fifo.json')
    os.utime(out / 'metrics.json', (1, 1))
    queue.add('metrics')
    queue.add('fifo')
    assert queue.poll()[0] == 0
    assert (out / 'metrics.json').read_text() == '{"loss": 0.1}'
    assert {'metrics-1.json', 'fifo-1.json', 'folder.json', 'records.json'} <= set(queue.names('out'))


@pytest.mark.parametrize('folder', ['complete', 'fail'])
def test_the_folders_of_what_ended_are_made_anew_when_they_are_missing(queue, folder):
    queue.add('a.sh', queue.gate() + f'exit {int(folder == "fail")}')
    poller = queue.start('--workers', '1')
    queue.pid('a.sh')
    (queue.path / folder).rmdir()
    queue.open_gate()
    assert poller.wait(30) == int(folder == 'fail')
    assert queue.all() == {'a.sh': folder}


def test_a_script_is_not_cancelled_because_its_folder_cannot_be_seen(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', 'echo ready; ' + queue.gate() + 'echo end')
    poller = queue.start('--workers', '1', log=queue.path.parent / 'log')
    until(lambda: queue.has_out('a.sh.stdout') and 'pid' in queue.record('a.sh'))
    os.rename(queue.path / 'running', queue.path / 'run')
    assert poller.wait(30) == 1
    assert 'cancel a.sh' not in poller.log()
    os.rename(queue.path / 'run', queue.path / 'running')
    queue.open_gate()
    assert queue.poll()[0] == 0
    assert queue.out('a.sh.stdout') == 'ready\nend\n'


def test_a_folder_of_the_queue_that_is_replaced_ends_its_poller_and_cancels_nothing(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '1')
    queue.pid('a.sh')
    (queue.path / 'running').rename(queue.path / 'running.old')
    (queue.path / 'running').mkdir()
    assert poller.wait(30) == 1
    assert 'cancel' not in poller.log()
    queue.open_gate()


def test_a_queue_that_vanishes_ends_its_poller_with_one_line(queue):
    queue.change(LOOK_AROUND=0.2)
    poller = queue.start('--workers', '1', '--exit', '0', log=queue.path.parent / 'log')
    queue.let_look(poller)
    os.rename(queue.path, queue.path.parent / 'elsewhere')
    assert poller.wait(30) == 1
    assert re.search(r'^fastgpu_poll: .*/q/\w+: No such file or directory; what runs goes on', poller.log(), re.M)
    assert 'Traceback' not in poller.log()


@pytest.mark.parametrize('another', [False, True], ids=['and nothing is there', 'and another is made there'])
def test_a_queue_that_is_moved_ends_its_poller_and_its_scripts_run_on(queue, another):
    queue.change(LOOK_AROUND=0.2)
    for name in 'ab':
        queue.add(name, queue.gate('gate-of-all'))
    queue.add('c', queue.gate('first'))
    gates = queue.path.parent
    for script in (queue.path / 'to_run').iterdir():
        script.write_text(script.read_text().replace(str(queue.path), str(gates)))
        os.utime(script, (1, 1))
    log = gates / 'log'
    poller = queue.start('--workers', '3', log=log)
    for name in 'abc':
        queue.pid(name)
    moved = queue.path.rename(gates / 'moved')
    if another:
        fastgpu.setup_dirs(queue.path)
    (gates / 'first').touch()  # what ends now makes its poller look for a folder
    assert poller.wait(30) == 1
    assert 'what runs goes on, and the next fastgpu_poll collects it' in poller.log()
    assert 'cancel' not in poller.log()
    assert queue.path.exists() == another
    queue.path = moved
    assert {'a', 'b'} <= set(queue.names('running'))
    (gates / 'gate-of-all').touch()


def test_a_script_that_ends_in_a_queue_that_was_moved_keeps_its_status_and_is_known_by_the_next_poller(queue):
    queue.change(LOOK_AROUND=0.2)
    ran = f'{queue.q}-ran'
    for name in 'ab':
        queue.add(name, f'echo ran >> {ran}; while ! [ -e {queue.q}-{name} ]; do sleep 0.01; done; exit 3')
    poller = queue.start('--workers', '2')
    pids = {queue.pid(name) for name in 'ab'}
    until(lambda: Path(f'{queue.path}-ran').exists() and Path(f'{queue.path}-ran').read_text() == 'ran\nran\n')
    kill(poller)
    old, queue.path = queue.path, queue.path.rename(f'{queue.path}-moved')
    Path(f'{old}-a').touch()
    until(lambda: queue.has_out('a.exitcode') == '3')
    second = queue.start('--workers', '2')
    until(lambda: queue.names('fail') == ['a'])
    assert queue.names('running') == ['b']
    assert not second.poll()
    (queue.path / 'running' / 'b').rename(queue.path / 'b')  # to cancel it works too
    assert second.wait(30) == 1
    assert 'cancelled b ' in second.log()
    assert not any(map(alive, pids))
    assert Path(f'{old}-ran').read_text() == 'ran\nran\n'


@pytest.mark.skipif(os.getuid() != 0, reason='only root can mount')
def test_a_queue_that_is_unmounted_is_not_made_anew_below(tmp_path, queue):
    mounted = tmp_path / 'mounted'
    mounted.mkdir()
    if subprocess.run(['mount', '--bind', queue.path, mounted], check=False, capture_output=True).returncode:
        pytest.skip('cannot mount here')
    script = queue.add('a.sh', queue.gate())
    log = tmp_path / 'log'
    with open(log, 'w') as err:
        poller = subprocess.Popen([*poller_with(LOOK_AROUND=0.2), '--workers', '1', '--path', mounted], stderr=err)
    queue.pollers.append(poller)
    queue.pid('a.sh')
    subprocess.run(['umount', '--lazy', mounted], check=True)
    queue.open_gate()
    assert poller.wait(30) == 1
    assert list(mounted.iterdir()) == []
    assert not script.exists()
    assert 'cancel' not in log.read_text()


# --- Rule 8: everybody gets a turn ------------------------------------------------------------------------------------

def test_queues_that_wait_for_a_gpu_get_it_in_turn(queues):
    queues = queues[:3]
    for queue in queues:
        for n in range(60 if queue is queues[0] else 6):
            queue.add(f'{n:02}', 'sleep 0.01')
    first = queues[0].start('--exit', '1')
    until(lambda: queues[0].names('complete'))
    for later in [queue.start('--exit', '1') for queue in queues[1:]]:
        assert later.wait(60) == 0
    assert len(queues[0].names('complete')) < 50  # it had not to end first
    order = in_turn(queues)
    turns = [list(group) for _, group in itertools.groupby(order[order.index(1):len(order) - order[::-1].index(1)])]
    assert statistics.median(map(len, turns)) == 1
    first.send_signal(signal.SIGTERM)


def test_pollers_of_one_queue_share_a_slot_in_turn(queue):
    queue.add('00', queue.gate())
    for n in range(1, 15):
        queue.add(f'{n:02}', f'echo $POLLER >> {queue.q}/ran; sleep 0.01')
    first, second = (queue.start('--workers', '1', env={**os.environ, 'POLLER': name}) for name in 'ab')
    until(lambda: 'worker 0 busy' in first.log() + second.log())  # from here on both are there
    queue.open_gate()
    assert [first.wait(60), second.wait(60)] == [0, 0]
    ran = Counter((queue.path / 'ran').read_text().split())
    assert min(ran['a'], ran['b']) >= 5


def test_whose_script_just_left_a_gpu_lets_those_go_first_who_waited(gpus, tmp_path):
    had, waits = (ResourcePoolGPU(tmp_path / name).claims for name in 'ab')
    assert had.take_some(1, 'first') == [0]
    assert had.take_some(1, 'second') == [1]
    assert had.take_some(1, 'third') == waits.take_some(1, 'other') == []
    had.unlock(0)
    assert had.take_some(1, 'third') == []
    assert waits.take_some(1, 'other') == [0]
    waits.leave()
    had.unlock(1)
    assert had.take_some(1, 'third') == [1]  # nobody else waits any more


@pytest.mark.parametrize('why', ['stopped', 'cannot use it'])
def test_who_waits_and_cannot_take_what_is_free_does_not_change_the_turns_of_others(queues, why):
    waits, *others = queues[:3]
    waits.add('x')
    args = ('--max-used', '100') if why == 'cannot use it' else ('--exit', '1')
    blocker = others[0]
    blocker.add('00', blocker.gate())
    first = blocker.start('--exit', '1')
    blocker.pid('00')
    poller = waits.start(*args)
    until(lambda: 'gpu 0 busy' in poller.log())
    if why == 'stopped':
        poller.send_signal(signal.SIGSTOP)
    for queue in others:
        for n in range(1, 5):
            queue.add(f'{n:02}', 'sleep 0.05')
    second = others[1].start('--exit', '1')
    until(lambda: 'gpu 0 busy' in second.log())
    blocker.open_gate()
    assert [first.wait(60), second.wait(60)] == [0, 0]
    order = in_turn(others)
    assert statistics.median(len(list(group)) for _, group in itertools.groupby(order)) == 1, order
    poller.kill()


def test_who_waits_and_does_not_take_what_is_free_keeps_nobody_from_it(queues):
    holder, stopped, other = queues[:3]
    holder.add('a', holder.gate())
    holder.start('--exit', '1')
    holder.pid('a')
    stopped.add('b')
    poller = stopped.start('--exit', '1')
    until(lambda: 'gpu 0 busy: runs a of yours' in poller.log())
    poller.send_signal(signal.SIGSTOP)
    for name in 'cde':
        other.add(name)
    late = other.start('--exit', '1')
    until(lambda: 'gpu 0 busy: runs a of yours' in late.log())
    holder.open_gate()
    assert late.wait(60) == 0
    poller.send_signal(signal.SIGCONT)
    assert poller.wait(60) == 0


def test_of_two_that_need_several_gpus_one_keeps_what_it_gets_and_the_other_waits(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fastgpu, 'STEP_BACK', 0)  # each could have what is free at once
    monkeypatch.setattr(fastgpu, 'LOOK_AROUND', 0.2)
    holder, first, second = (ResourcePoolGPU(tmp_path / name).claims for name in 'abc')
    assert holder.take_some(2, 'both') == [0, 1]
    assert first.take_some(2, 'first') == second.take_some(2, 'second') == []
    holder.unlock(1)
    assert second.take_some(2, 'second') == first.take_some(2, 'first') == []
    assert (list(second.locks), list(first.locks)) == ([], [1])
    holder.unlock(0)
    assert second.take_some(2, 'second') == []
    assert first.take_some(2, 'first') == [0, 1]
    first.unlock(0, 1)
    until(lambda: second.take_some(2, 'second') == [0, 1])  # when it asks again


def test_pollers_that_want_all_gpus_do_not_block_each_other_however_slow_the_driver_is(gpus, tmp_path):
    for gpu in gpus.gpus:
        gpu['delay'] = 0.1
    gpus.save()
    queues = [Queue(tmp_path / name) for name in ('q1', 'q2')]
    for queue in queues:
        for n in range(2):
            body = f'cd {shlex.quote(str(tmp_path))}; mkdir held || exit 1; sleep 0.02; rmdir held'
            queue.add(f'{n}', f'#SBATCH --gpus=2\n{body}')
    pollers = [queue.start('--exit', '1') for queue in queues]
    assert [poller.wait(60) for poller in pollers] == [0, 0]


def test_a_script_that_needs_several_gpus_is_not_starved_by_small_ones(gpus, queues):
    gpus.have(2)
    *streams, wants = queues[:3]
    for queue in streams:
        for n in range(80):
            queue.add(f'{n:02}', 'sleep 0.1')
    pollers = [queue.start('--exit', '1') for queue in streams]
    until(lambda: all(queue.names('complete') for queue in streams))
    wants.add('big.sh', '#SBATCH --gpus=2\n' + wants.gate())
    big = wants.start('--exit', '1')
    wants.pid('big.sh')
    assert all(queue.names('to_run') for queue in streams)
    wants.open_gate()
    assert big.wait(60) == 0
    for poller in pollers:
        poller.send_signal(signal.SIGTERM)


def test_what_is_kept_for_one_script_is_not_for_the_next(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fastgpu, 'LOOK_AROUND', 0.2)
    gpus.have(4)
    holder, keeper = (ResourcePoolGPU(tmp_path / name).claims for name in 'ab')
    assert holder.take_some(1, 'a') == [0]
    assert keeper.take_some(4, 'big') == []
    assert list(keeper.locks) == [1, 2, 3]
    keeper.take_some(2, 'small')
    until(lambda: keeper.take_some(2, 'small') == [1, 2])
    assert ResourcePoolGPU(tmp_path / 'c').lock(3)


@pytest.mark.parametrize('end', ['cancelled', 'stopped', 'killed', 'refused'])
def test_what_is_kept_is_free_when_nobody_needs_it_any_more(gpus, queues, end):
    gpus.have(2)
    holder, wants, other = queues[:3]
    holder.add('a', holder.gate())
    holder.start('--exit', '1')
    holder.pid('a')
    big = wants.add('big.sh', '#SBATCH --gpus=2\n')
    poller = wants.start('--exit', '0')
    until(lambda: 'gpu 1 kept for big.sh, which needs 2\n' in poller.log())
    other.add('b')
    late = other.start('--exit', '1')
    kept = f'kept for big.sh of yours (pid {poller.pid}, {wants.path}), which needs 2\n'
    until(lambda: f'gpu 1 busy: {kept}' in late.log())
    assert 'kept for big.sh of ' in status(other)[1]
    if end == 'cancelled':
        big.unlink()
    elif end == 'refused':
        big.write_text('#!/bin/sh\n#SBATCH --gpus=3\n')
    else:
        poller.send_signal(signal.SIGTERM if end == 'stopped' else signal.SIGKILL)
    assert late.wait(60) == 0
    holder.open_gate()


def test_a_script_of_the_same_queue_that_sorts_first_gets_what_was_kept_for_another(gpus, queue):
    gpus.have(2)
    queue.add('a.sh', queue.gate())
    poller = queue.start('--exit', '1')
    queue.pid('a.sh')
    queue.add('big.sh', '#SBATCH --gpus=2\n')
    until(lambda: 'gpu 1 kept for big.sh, which needs 2\n' in poller.log())
    queue.add('b.sh')
    until(lambda: queue.names('complete') == ['b.sh'])
    queue.open_gate()
    assert poller.wait(30) == 0
    assert queue.record('big.sh')['ids'] == [0, 1]


def test_what_cannot_be_met_now_keeps_nothing(gpus, queues):
    gpus.have(2)
    gpus.change(1, action=1)
    queues[0].change(LOOK_AROUND=0.2)
    queues[0].add('big', '#SBATCH --gpus=2')
    wants = queues[0].start('--exit', '1')
    until(lambda: '(only 1 can be used now)' in wants.log())
    queues[1].add('small')
    assert queues[1].poll('--exit', '1')[0] == 0
    gpus.change(1, action=0)
    assert wants.wait(30) == 0


def test_who_needs_several_gpus_waits_for_no_one_who_needs_other_ones(gpus, queues, monkeypatch):
    gpus.have(4)
    gpus.change(0, pids=[4121])
    for queue, visible in zip(queues, ('0,1', '2,3')):
        queue.add('big.sh', '#SBATCH --gpus=2\n')
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        poller = queue.start('--exit', '1')
        until(lambda poller=poller: 'kept for big.sh' in poller.log() or poller.poll() == 0)
    assert queues[1].names('complete') == ['big.sh']
    assert queues[0].names('to_run') == ['big.sh']


def test_who_needs_several_and_came_first_is_first_everywhere(gpus, tmp_path):
    gpus.have(8)
    first, second = (ResourcePoolGPU(tmp_path / name).claims for name in 'ab')
    assert first._is_first(2)
    assert not second._is_first(2)
    assert first._is_first(2)
    plant = gpus.locks / f'fastgpu-{gpus.gpus[3]["uuid"]}.lock'
    plant.unlink()
    plant.mkdir()  # one that cannot be used does not keep them from the others
    third = ResourcePoolGPU(tmp_path / 'c').claims
    first.leave()
    second.leave()
    assert third._is_first(2)


def test_queues_with_all_kinds_of_demands_under_kill_9_share_the_gpus_and_all_come_to_an_end(gpus, queues):
    gpus.have(3)
    rng, options = random.Random(os.environ.get('SEED')), [1, 2, 3, 1]
    for queue in queues:
        for n in range(12):
            need = '#SBATCH --gpus=2\n' * (rng.random() < 0.2)
            queue.add(f'{n:02}', f'{need}date +%s.%N; sleep {rng.random() / 10:.2f}; date +%s.%N')
    live = {}
    deadline = time.monotonic() + 60
    while any(queue.names('to_run') + queue.names('running') for queue in queues):
        assert time.monotonic() < deadline
        for queue, number in zip(queues, options):
            if queue not in live or live[queue].poll() is not None:
                live[queue] = queue.start('--exit', '1', '--per-gpu', str(number))
        time.sleep(rng.random() / 5)
        if time.monotonic() < deadline - 54:
            live[rng.choice(queues)].kill()
    uses = {}  # of each GPU: when it began and ended, and how many its poller lets share it
    for queue, number in zip(queues, options):
        assert len(queue.names('complete')) == 12
        for name in queue.names('complete'):
            began, ended = map(float, queue.out(f'{name}.stdout').split())
            for ident in queue.record(name)['ids']:
                uses.setdefault(str(ident)[0], []).append((began, ended, number))
    for of_one in uses.values():
        for began, *_ in of_one:
            at_once = [use for use in of_one if use[0] <= began < use[1]]
            numbers = [number for _, _, number in at_once]  # 1 is for all of it; of others, each has a place
            assert len(at_once) <= (1 if 1 in numbers else max(numbers)), at_once


# --- GPUs: which of them, and what a script sees ----------------------------------------------------------------------

def test_all_gpus_are_used_and_a_script_sees_its_own(gpus, queue):
    for name in 'ab':
        queue.add(name, SEES + '; ' + queue.gate())
    poller = queue.start('--exit', '1')
    until(lambda: queue.has_out('a.stdout') and queue.has_out('b.stdout'))
    queue.open_gate()
    assert poller.wait(30) == 0
    assert sorted(queue.out(f'{name}.stdout') for name in 'ab') == ['0 0 PCI_BUS_ID\n', '1 1 PCI_BUS_ID\n']
    assert re.search(r' gpu 0: start a\n', poller.log())
    assert sorted(os.listdir(gpus.locks)) == [f'fastgpu-{gpu["uuid"]}.lock' for gpu in gpus.gpus]


def test_cuda_visible_devices_limits_the_gpus_and_keeps_their_numbers(gpus, queue, monkeypatch):
    gpus.have(4)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,2')
    for name in 'abc':
        queue.add(name, SEES + '; ' + queue.gate())
    poller = queue.start('--exit', '1')
    until(lambda: queue.has_out('a.stdout') and queue.has_out('b.stdout'))
    queue.open_gate()
    assert poller.wait(30) == 0
    assert [queue.out(f'{name}.stdout') for name in 'ab'] == ['3 3 PCI_BUS_ID\n', '2 2 PCI_BUS_ID\n']


@pytest.mark.parametrize(('listed', 'ids'), [
    (None, [0, 1, 2]), ('2,0', [2, 0]), (' 1 , 2 ', [1, 2]), ('1,-1,2', [1]), ('1,,2', [1]), ('2,9,0', [2]),
    ('0,x', [0]), ('2,1,', [2, 1]),
    (A, [A]), ('GPU-aaaa1', [A]), ('GPU-c,GPU-aaaa2', [C, B]), (f'1,{C}', [B, C]), (f'{B},GPU-d,{A}', [B]),
])
def test_cuda_visible_devices_has_cudas_grammar(gpus, queue, monkeypatch, capsys, listed, ids):
    gpus.set({'uuid': A}, {'uuid': B}, {'uuid': C})
    if listed is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', listed)
    pool = ResourcePoolGPU(queue.path)
    assert pool.all_ids() == ids
    assert pool.environment(ids[0])['CUDA_VISIBLE_DEVICES'] == str(ids[0])
    ends_early = re.search('9|x|GPU-d|-1|,,', listed or '')
    assert ('left out, as CUDA does' in capsys.readouterr().err) == bool(ends_early)


@pytest.mark.parametrize(('listed', 'words'), [
    ('', 'CUDA_VISIBLE_DEVICES= hides all GPUs; unset it; --workers N runs'),
    ('-1', 'CUDA_VISIBLE_DEVICES=-1 hides all GPUs (there is no GPU "-1"); unset it'),
    ('NoDevFiles', 'hides all GPUs (there is no GPU "NoDevFiles")'),
    ('7,0', 'hides all GPUs (there is no GPU "7")'),
    ('GPU-aaaa', f'CUDA_VISIBLE_DEVICES=GPU-aaaa: GPU-aaaa could be {A} or {B}'),
    ('0,1,0', 'CUDA_VISIBLE_DEVICES=0,1,0 names 0 twice'),
    (f'0,{A}', f'names {A} twice'),
    ('\x1b[31m', r'CUDA_VISIBLE_DEVICES=\x1b[31m hides all'),
])
def test_a_list_that_shows_no_gpu_or_is_unclear_is_refused_in_one_line(gpus, tmp_path, monkeypatch, listed, words):
    gpus.set({'uuid': A}, {'uuid': B}, {'uuid': C})
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', listed)
    code, said = answer('--path', tmp_path)
    assert code == 2
    assert words in said
    assert said.count('\n') == 1


def test_people_read_the_number_of_a_gpu_and_the_uuid_of_an_instance(gpus, tmp_path, monkeypatch):
    gpus.set({'uuid': A}, {'uuid': B, 'mig': [{'uuid': 'MIG-1'}]})
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', f'MIG-1,{A}')
    pool = ResourcePoolGPU(tmp_path / 'q', per_gpu=2)
    assert pool.all_ids() == ['MIG-1', A, 'MIG-1.1', f'{A}.1']
    assert list(map(pool.label, pool.all_ids())) == ['MIG-1', '0', 'MIG-1.1', '0.1']


@pytest.mark.parametrize('uuid', ['GPU-12345678-1234-1234-1234-123456789abc', '12345678-1234-1234-1234-123456789abc'])
def test_a_uuid_may_lack_its_first_letters(gpus, queue, monkeypatch, uuid):
    gpus.set({'uuid': uuid})
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', uuid[:10])
    assert ResourcePoolGPU(queue.path).all_ids() == [uuid]


@pytest.mark.parametrize(('state', 'words'), [
    ({'init': 9}, 'no NVIDIA driver found (Driver Not Loaded)'), ({}, 'the NVIDIA driver shows no GPU')])
def test_no_driver_or_no_gpus_is_one_line_and_status_2(gpus, tmp_path, state, words):
    gpus.set(**state)
    assert answer('--path', tmp_path) == (2, f'fastgpu_poll: {words}; --workers N runs without GPUs\n')
    assert not (tmp_path / 'to_run').exists()


# --- GPUs: MIG --------------------------------------------------------------------------------------------------------

def test_instances_of_a_gpu_in_mig_mode_are_the_resources(gpus, queue, capsys):
    mig_box(gpus)
    pool = ResourcePoolGPU(queue.path)
    assert pool.all_ids() == [A, 'MIG-1', 'MIG-2', 'MIG-3']
    assert 'gpu 2 unusable: is in MIG mode and has no instances' in capsys.readouterr().err
    assert [pool.lock_next() for _ in range(5)] == [A, 'MIG-1', 'MIG-2', 'MIG-3', None]
    assert pool.environment('MIG-2')['CUDA_VISIBLE_DEVICES'] == 'MIG-2'
    assert set(os.listdir(gpus.locks)) == {f'fastgpu-{uuid}.lock' for uuid in pool.all_ids()}


def test_an_instance_is_busy_by_itself(gpus, queue):
    mig_box(gpus)
    gpus.gpus[1]['mig'][0]['pids'] = [4121]
    gpus.gpus[1]['mig'][2]['used'] = 2000
    gpus.save()
    pool = ResourcePoolGPU(queue.path)
    assert [ident for ident in pool.all_ids() if pool.is_available(ident)] == [A, 'MIG-3']


@pytest.mark.parametrize(('listed', 'ids'), [
    ('1', ['MIG-1', 'MIG-2', 'MIG-3']), (B, ['MIG-1', 'MIG-2', 'MIG-3']), ('MIG-2', ['MIG-2']),
    ('MIG-3,0', ['MIG-3', A]),
])
def test_cuda_visible_devices_names_instances(gpus, queue, monkeypatch, listed, ids):
    mig_box(gpus)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', listed)
    assert ResourcePoolGPU(queue.path).all_ids() == ids


def test_an_instance_of_an_old_driver_has_a_lock_file_too(gpus, queue):
    gpus.set({'uuid': B, 'mig': [{'uuid': f'MIG-{B}/1/0'}]})
    assert ResourcePoolGPU(queue.path).lock_next() == f'MIG-{B}/1/0'
    assert f'fastgpu-MIG-{B}_1_0.lock' in os.listdir(gpus.locks)


def test_old_names_of_instances_and_one_that_may_not_be_used(gpus, queue, monkeypatch):
    gpus.set({'uuid': 'GPU-11111111-1', 'mig': [{'uuid': 'MIG-a'}, {'uuid': 'MIG-b', 'uuid-error': 4},
                                                 {'uuid': 'MIG-c'}]})
    assert ResourcePoolGPU(queue.path).all_ids() == ['MIG-a', 'MIG-c']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'MIG-GPU-11111111-1/3/0')
    assert ResourcePoolGPU(queue.path).all_ids() == ['MIG-c']


# --- GPUs: old drivers, and what comes and goes -----------------------------------------------------------------------

@pytest.mark.parametrize('missing', [['nvmlDeviceGetMemoryInfo_v2'], ['nvmlDeviceGetComputeRunningProcesses_v3'],
                                     ['nvmlDeviceGetMemoryInfo_v2', 'nvmlDeviceGetComputeRunningProcesses_v3',
                                      'nvmlDeviceGetMigMode']])
def test_drivers_without_the_newer_functions_serve(gpus, queue, missing):
    gpus.change(0, pids=[4121])
    gpus.save(missing=missing)
    pool = ResourcePoolGPU(queue.path)
    assert pool.lock_next() == 1
    assert 'pid 4121' in pool.reasons[0]


def test_what_an_old_driver_does_not_know_is_no_reason(gpus, pool):
    gpus.save(missing=['nvmlDeviceGetGraphicsRunningProcesses_v3', 'nvmlDeviceGetComputeMode',
                       'nvmlDeviceGetFieldValues', 'nvmlDeviceGetNumaNodeId'])
    assert pool.is_available(0)


def test_a_driver_without_any_list_of_processes_is_unusable(gpus, queue):
    gpus.save(missing=['nvmlDeviceGetComputeRunningProcesses_v3', 'nvmlDeviceGetComputeRunningProcesses_v2'])
    pool = ResourcePoolGPU(queue.path)
    assert pool.lock_next() is None
    assert pool.reasons[0] == 'unusable: Function Not Found'


def test_where_processes_are_not_told_memory_decides_with_one_warning(gpus, queue, capsys):
    gpus.gpus[0].update(processes=3, used=2000)
    gpus.gpus[1].update(processes=3)
    gpus.save()
    pool = ResourcePoolGPU(queue.path)
    assert pool.lock_next() == 1
    assert capsys.readouterr().err.count('does not tell its processes') == 1


def test_the_warning_of_the_old_package_pynvml_does_not_reach_the_user(gpus, queue, tmp_path):
    site = tmp_path / 'old'
    site.mkdir()
    real = importlib.util.find_spec('pynvml').origin
    (site / 'pynvml.py').write_text('import warnings; warnings.warn("deprecated", FutureWarning)\n'
                                    + Path(real).read_text())
    environment = {**os.environ, 'PYTHONPATH': f'{site}:{os.environ["PYTHONPATH"]}'}
    environment.pop('PYTHONWARNINGS', None)
    queue.add('a.sh')
    assert 'deprecated' not in queue.poll('--exit', '1', env={**environment, 'PYTHONPATH': str(site)})[1]


@pytest.mark.parametrize(('gone', 'words'), [(1, 'Uninitialized'), (9, 'Driver Not Loaded'),
                                             (18, 'NVML/RM version mismatch')])
def test_a_driver_that_goes_is_told_once_and_used_again_when_it_is_back(gpus, queue, gone, words):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', queue.gate())
    poller = queue.start('--exit', '1')
    until(lambda: queue.names('running') == ['a.sh'])
    gpus.save(gone=gone, init=gone)
    queue.add('b.sh')
    until(lambda: words in poller.log())
    queue.open_gate()
    until(lambda: queue.names('complete') == ['a.sh'])
    gpus.save(init=gone)
    assert queue.names('to_run') == ['b.sh']
    gpus.save()
    assert poller.wait(30) == 0
    assert poller.log().count(words) == 1
    assert 'nothing starts until it is back' in poller.log()
    assert 'the NVIDIA driver is back\n' in poller.log()


def test_a_driver_that_was_upgraded_under_a_poller_starts_nothing(gpus, queue, tmp_path, capsys):
    pool = ResourcePoolGPU(queue.path)
    library = tmp_path / 'libnvidia-ml.so.1'
    library.write_bytes(b'x' * 4096)
    with open(library, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert pool.is_available(0)
        (tmp_path / 'new').write_bytes(b'y' * 4096)
        os.rename(tmp_path / 'new', library)
        assert not pool.is_available(0)
        assert not pool.is_available(0)
        library.unlink()
        assert not pool.is_available(0)
    assert capsys.readouterr().err.count(
        'the NVIDIA driver was upgraded: reboot, or restart fastgpu_poll once nvidia-smi works\n') == 1


def test_gpus_that_a_driver_came_back_with_under_other_numbers_go_by_uuid(gpus, queue):
    gpus.have(3)
    pool = ResourcePoolGPU(queue.path)
    gpus.save(gone=9, init=9)
    assert pool.lock_next() is None
    uuid = gpus.gpus[0]['uuid']
    gpus.set(*reversed(gpus.gpus))
    assert pool.lock_next() == 0
    assert pool.environment(0)['CUDA_VISIBLE_DEVICES'] == uuid


def test_a_gpu_that_fails_is_left_out_and_the_others_go_by_uuid(gpus, queue, capsys):
    gpus.set({'uuid': A}, {'uuid': B, 'handle': 15}, {'uuid': C, 'migmode': 4})
    pool = ResourcePoolGPU(queue.path)
    assert pool.all_ids() == [A]
    err = capsys.readouterr().err
    assert 'gpu 1 unusable: GPU is lost\n' in err
    assert 'gpu 2 unusable: Insufficient Permissions\n' in err
    gpus.set({'uuid': A, 'handle': 15})
    with pytest.raises(FastgpuError, match='no GPU is usable: gpu 0: GPU is lost'):
        ResourcePoolGPU(queue.path)


def test_a_gpu_that_is_lost_later_is_unusable_while_the_others_go_on(gpus, queue):
    pool = ResourcePoolGPU(queue.path)
    gpus.gpus[0]['uuid'] = 'GPU-another'
    gpus.save()
    assert pool.lock_next() == 1
    assert pool.reasons[0] == 'unusable: Not Found'


def test_when_a_gpu_is_lost_scripts_get_uuids(gpus, queue):
    gpus.have(2)
    pool = ResourcePoolGPU(queue.path)
    assert pool.environment(1)['CUDA_VISIBLE_DEVICES'] == '1'
    gpus.change(0, memory=15)
    assert not pool.is_available(0)
    assert pool.environment(1)['CUDA_VISIBLE_DEVICES'] == gpus.gpus[1]['uuid']
    assert pool.label(1) == '1'


def test_a_lost_gpu_does_not_cost_another_whose_uuid_is_not_found_because_of_it(gpus, queue):
    gpus.have(2)
    pool = ResourcePoolGPU(queue.path)
    gpus.change(1, **{'by-uuid': True})
    gpus.save(**{'by-uuid': 15})  # GPU_IS_LOST, "if any GPU has fallen off the bus"
    assert pool.is_available(1)
    gpus.gpus[0], gpus.gpus[1] = gpus.gpus[1], gpus.gpus[0]  # another one has its number now
    gpus.save(**{'by-uuid': 15})
    assert not pool.is_available(1)


# --- GPUs: the kinds of 2026, as their drivers' documentation and users' notes describe them --------------------------

def test_what_is_a_graphics_process_too_counts_by_its_memory_alone(gpus, pool):
    gpus.change(0, pids=[7, 8], graphics=[7, 8, 9], used=1000)  # kwin_wayland, nautilus; Xorg is in one list only
    assert pool.is_available(0)
    gpus.change(0, used=1025)
    assert not pool.is_available(0)
    assert pool.reasons[0] == 'busy: 1.0 GiB used by no compute process; free is up to 1.0 GiB'
    gpus.change(0, used=1000, pids=[7, 2**22 + 10])
    assert not pool.is_available(0)
    assert pool.reasons[0] == f'busy: 1000 MiB used by pid {2**22 + 10}'


def test_the_server_of_mps_counts_by_its_memory_alone(gpus, pool, mps):
    gpus.change(0, pids=[os.getpid()])
    assert not pool.is_available(0)
    gpus.change(0, pids=[mps])
    assert pool.is_available(0)
    gpus.change(0, used=2000)
    assert not pool.is_available(0)


def test_where_memory_is_that_of_the_machine_the_processes_decide(gpus, pool, capsys):
    gpus.change(0, memory=NOT_SUPPORTED)  # GB10, Thor
    assert pool.is_available(0)
    assert pool.is_available(0)
    said = 'gpu 0 shares the memory of the machine: that of its processes counts\n'
    assert capsys.readouterr().err.count(said) == 1
    gpus.change(0, pids=[2**22 + 7], memory_of={str(2**22 + 7): 24000})
    assert not pool.is_available(0)
    assert pool.reasons[0] == f'busy: 23.4 GiB used by pid {2**22 + 7}'
    gpus.change(0, graphics=[2**22 + 7])
    assert not pool.is_available(0)
    assert pool.reasons[0] == 'busy: 23.4 GiB used by no compute process; free is up to 1.0 GiB'
    gpus.change(0, memory_of={str(2**22 + 7): None})
    assert not pool.is_available(0)
    assert pool.reasons[0] == f'busy: pid {2**22 + 7} does not tell its memory'
    gpus.change(0, processes=NOT_SUPPORTED, pids=[])
    assert not pool.is_available(0)
    assert 'tells neither its memory nor its processes: --workers 1 ' in pool.reasons[0]


def test_who_shares_a_gpu_and_does_not_tell_his_memory_is_a_reason(gpus, queue):
    gpus.have(1)
    gpus.change(0, memory=NOT_SUPPORTED)
    pool = ResourcePoolGPU(queue.path, per_gpu=2)
    assert pool.lock_next() == 0
    gpus.change(0, pids=[2**22 + 7], memory_of={str(2**22 + 7): None})
    assert not pool.is_available('0.1')
    assert pool.reasons['0.1'] == f'busy: pid {2**22 + 7} does not tell its memory'


def test_a_further_script_needs_its_share_of_the_machines_memory_where_that_is_the_gpus(gpus, queue):
    gpus.have(1)
    gpus.change(0, memory=NOT_SUPPORTED)
    pool = ResourcePoolGPU(queue.path, per_gpu=2)
    assert pool.lock_next() == 0
    gpus.change(0, pids=[7], memory_of={'7': 1})
    assert pool.lock_next() == '0.1'
    pool.unlock('0.1')
    gpus.change(0, memory_of={'7': 10**7})
    assert pool.lock_next() is None


def test_the_memory_of_a_numa_node_counts_by_its_processes(gpus, pool):
    gpus.change(0, numa=0, used=40000)  # GH200: pages that an ended process left
    assert pool.is_available(0)
    gpus.change(0, pids=[7], memory_of={'7': 5})
    assert not pool.is_available(0)
    status = fastgpu.look_at_queue(pool)
    assert status['resources'][0]['memory_used'] is None
    assert 'gpu 0  NVIDIA H100  busy: ' in fastgpu.screen(status)


def test_a_gpu_in_prohibited_mode_is_not_used_and_exclusive_mode_is_warned_of_without_mps(gpus, queue, capsys, mps):
    gpus.have(1)
    pool = ResourcePoolGPU(queue.path, per_gpu=2)
    gpus.change(0, mode=2)
    assert not pool.is_available(0)
    assert pool.reasons[0] == 'unusable: its compute mode is Prohibited (sudo nvidia-smi -c 0 mends that)'
    gpus.change(0, mode=3, pids=[mps])
    assert pool.is_available(0)
    assert 'Exclusive' not in capsys.readouterr().err
    gpus.change(0, pids=[])
    assert pool.is_available(0)
    assert 'warning: gpu 0 is in Exclusive_Process mode: that needs MPS for several' in (
        capsys.readouterr().err)


@pytest.mark.parametrize(('action', 'words'), [(1, 'reset'), (2, 'reboot'), (4, 'drain and reset'), (6, 'bus reset'),
                                               (7, 'system reboot'), (0, ''), (3, ''), (5, ''), (None, '')])
def test_a_gpu_that_needs_a_reset_is_unusable(gpus, pool, action, words):
    gpus.change(0, action=action)
    assert pool.is_available(0) == (not words)
    assert pool.reasons[0] == (f'unusable: it needs a {words}' if words else '')


# --- GPUs: when the driver is asked -----------------------------------------------------------------------------------

@pytest.mark.parametrize('places', [1, 8])
def test_nvml_is_asked_only_while_a_script_waits_and_once_a_second_however_many_places_a_gpu_has(gpus, queue, places):
    queue.change(LOOK_AROUND=0.3)  # that second
    poller = queue.start('--exit', '0', '--per-gpu', str(places))
    queue.add('a.sh')
    until(lambda: queue.names('complete') == ['a.sh'])
    assert len(gpus.calls('memory')) == 1
    queue.let_look(poller)
    assert len(gpus.calls('memory')) == 1
    gpus.change(0, used=5000)
    gpus.change(1, used=5000)
    queue.add('b.sh')
    until(lambda: len(gpus.calls('memory')) >= 7)
    for gpu in gpus.gpus:
        times = [seconds for uuid, seconds in gpus.calls('memory')[1:] if uuid == gpu['uuid']]
        assert all(later - earlier >= 0.29 for earlier, later in zip(times, times[1:]))
    assert poller.poll() is None


def test_a_gpu_that_our_own_script_left_is_asked_at_once(gpus, queue):
    gpus.set({'uuid': A, 'total': 10240})
    queue.change(LOOK_AROUND=600)  # when it is asked again otherwise
    queue.add('a.sh', queue.gate())
    poller = queue.start('--exit', '1', '--per-gpu', '2')
    queue.pid('a.sh')
    gpus.change(0, used=6000)
    queue.add('b.sh')
    until(lambda: 'gpu 0.1 busy' in poller.log())
    gpus.change(0, used=500)
    queue.open_gate()
    assert poller.wait(30) == 0
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}


def test_a_slow_driver_delays_the_notice_of_an_end_by_one_call_at_most(gpus, queue):
    gpus.have(4)
    for n in range(1, 4):
        gpus.gpus[n].update(delay=0.1, pids=[1])
    gpus.save()
    queue.add('a.sh', queue.gate())
    queue.add('b.sh')
    poller = queue.start('--exit', '1')
    until(lambda: len(gpus.calls('processes')) > 2)
    queue.open_gate()
    until(lambda: queue.names('complete'))
    ended = (queue.path / 'out' / 'a.sh.exitcode').stat().st_mtime
    noticed = (queue.path / 'complete').stat().st_mtime
    calls = [at + time.time() - time.monotonic() for name in ('memory', 'processes') for _, at in gpus.calls(name)]
    assert len([at for at in calls if ended < at < noticed]) <= 1
    assert poller.wait(60) == 0


# --- GPUs: several per script, and several scripts per GPU ------------------------------------------------------------

@pytest.mark.parametrize(('head', 'number'), [
    ('#SBATCH --gpus=2', 2), ('#SBATCH --gpus 2', 2), ('#SBATCH -G 3', 3), ('#SBATCH -G3', 3),
    ('#SBATCH --gres=gpu:2', 2), ('#SBATCH --gres gpu:a100:2', 2),
    ('#SBATCH --gres=gpu', 1), ('#SBATCH --gres=gpu:a100', 1),
    ('#SBATCH --gres=gpu:1080:2,shard:4', 2), ('#SBATCH --gres=shard:4', 1), ('#SBATCH --gres=gpu:a:1,gpu:b:2', 3),
    ('#SBATCH --gpus=a100:2,v100:1', 3), ('#SBATCH --gpus-per-node=4', 4), ('#SBATCH --gpus-per-node=h100:4', 4),
    ('#SBATCH --time=4:00:00 --gpus=2 --mem=8G', 2), ('#SBATCH --gpus=2 # or -G 3', 2), ('#SBATCH --gpus=0', 1),
    ('#SBATCH --gpus=2\n#SBATCH --gpus=1', 1), ('#SBATCH --gpus=2\n#SBATCH --gres=gpu:1', 2),
    ('# a comment\n\n#SBATCH --gpus=2', 2), ('echo\n#SBATCH --gpus=2', 1), ('##SBATCH --gpus=2', 1),
    ('# SBATCH --gpus=2', 1), ('#SBATCH --cpus-per-gpu=2', 1), ('#SBATCH --gpus-per-task=2', 1),
    ('#SBATCHX --gpus=2', 1), ('', 1), ('\x7fELF', 1), ('#SBATCH --gpus=2\r', 2),
])
def test_gpus_are_asked_for_as_of_slurm(queue, head, number):
    assert fastgpu.gpus_wanted(queue.add('a.sh', head)) == number
    assert fastgpu.gpus_wanted(queue.path / 'nowhere') == 1


def test_a_script_gets_all_the_gpus_it_asks_for_or_waits_and_so_do_those_behind(gpus, queue):
    gpus.have(3)
    queue.add('1', queue.gate())
    queue.add('2', f'#SBATCH --gpus=3\n{SEES}')
    queue.add('3', SEES)
    poller = queue.start('--exit', '1')
    until(lambda: queue.names('running') == ['1'])
    queue.let_look(poller)
    assert queue.all() == {'1': 'running', '2': 'to_run', '3': 'to_run'}
    assert poller.log().count('2 waits for 3 gpus at once, and all behind it wait too\n') == 1
    queue.open_gate()
    assert poller.wait(30) == 0
    assert queue.out('2.stdout') == '0,1,2 0,1,2 PCI_BUS_ID\n'
    assert queue.record('2')['ids'] == [0, 1, 2]
    assert queue.record('3')['started'] >= queue.record('2')['finished']
    assert ' gpu 0,1,2: start 2\n' in poller.log()


def test_per_gpu_runs_so_many_scripts_on_each_and_fills_the_gpus_first(gpus, queue):
    for name in 'abcde':
        queue.add(name, SEES + '; ' + queue.gate())
    poller = queue.start('--per-gpu', '2')
    until(lambda: all(queue.has_out(f'{name}.stdout') for name in 'abcd'))
    assert queue.names('to_run') == ['e']
    assert [queue.out(f'{name}.stdout').split()[0] for name in 'abcd'] == ['0', '1', '0', '1']
    assert [queue.record(name)['ids'] for name in 'abcd'] == [[0], [1], ['0.1'], ['1.1']]
    queue.open_gate()
    assert poller.wait(30) == 0


def test_a_further_script_needs_its_share_of_memory_and_the_first_a_free_gpu(gpus, queue):
    gpus.set({'uuid': A, 'total': 10240, 'used': 3000})
    pool = ResourcePoolGPU(queue.path, per_gpu=2)
    assert pool.lock_next() is None
    assert pool.reasons[0] == 'busy: 2.9 GiB used by no compute process; free is up to 1.0 GiB'
    gpus.change(0, used=100)
    assert pool.lock_next() == 0
    gpus.change(0, used=5121, pids=[4121])
    assert pool.lock_next() is None
    assert pool.reasons['0.1'] == ('busy: 5.0 GiB used by pid 4121; '
                                    'one more script needs 5.0 GiB of 10.0 GiB free')
    gpus.change(0, used=5120)
    assert pool.lock_next() == '0.1'
    assert pool.lock_next() is None


def test_a_script_with_several_gpus_gets_places_on_several(gpus, queue):
    queue.add('a.sh', f'#SBATCH --gpus=2\n{SEES}')
    assert queue.poll('--per-gpu', '3')[0] == 0
    assert queue.out('a.sh.stdout') == '0,1 0,1 PCI_BUS_ID\n'


# --- GPUs: without nvidia-ml-py, through nvidia-smi -------------------------------------------------------------------

def test_nvidia_smi_serves_and_is_said_to_once(smi, queue):
    for name in 'ab':
        queue.add(name, SEES)
    status, log = queue.poll('--exit', '1')
    assert status == 0
    assert log.count('asking nvidia-smi, which is slower and knows no MIG: pip install nvidia-ml-py\n') == 1
    assert queue.out('a.stdout') == '0 0 PCI_BUS_ID\n'


def test_nvidia_smi_has_the_same_rule_and_the_same_messages(smi, queue):
    queue.change(LOOK_AROUND=0.2)
    smi.gpu(A, (2**22 + 1, 'C', '300 MiB'), used='23654 MiB')
    smi.gpu(B, action='Reset')
    queue.add('a.sh')
    poller = queue.start('--exit', '1')
    until(lambda: f'gpu 0 busy: 23.1 GiB used by pid {2**22 + 1}\n' in poller.log())
    until(lambda: 'gpu 1 unusable: it needs a reset\n' in poller.log())
    smi.gpu(B, mode='Prohibited')
    until(lambda: 'gpu 1 unusable: its compute mode is Prohibited' in poller.log())
    smi.gpu(B, used='1025 MiB')
    until(lambda: 'gpu 1 busy: 1.0 GiB used by no compute process; free is up to 1.0 GiB\n' in poller.log())
    smi.gpu(B, (2**22 + 2, 'C', '[N/A]'), used='N/A', total='N/A')
    until(lambda: f'gpu 1 busy: 0 MiB used by pid {2**22 + 2}\n' in poller.log())
    (smi.path / 'broken').write_text('NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver.\n')
    until(lambda: 'the NVIDIA driver is gone (NVIDIA-SMI has failed' in poller.log())
    (smi.path / 'broken').unlink()
    until(lambda: 'the NVIDIA driver is back' in poller.log())
    smi.gpu(B, (2**22 + 2, 'C+G', '900 MiB'), (2**22 + 3, 'G', '2 MiB'), used='1000 MiB')  # a desktop
    assert poller.wait(30) == 0


def test_one_gpu_that_nvidia_smi_cannot_reach_is_unusable_and_the_driver_not_gone(smi, queue):
    queue.change(LOOK_AROUND=0.2)
    smi.gpu(B, (4121, 'C', '300 MiB'))
    queue.add('a.sh', SEES)
    poller = queue.start('--exit', '0')
    until(lambda: 'gpu 0: start a.sh' in poller.log())
    queue.add('b.sh', SEES)
    smi.lose(A)
    until(lambda: 'gpu 0 unusable: No devices were found\n' in poller.log() and 'gpu 1 busy' in poller.log())
    smi.gpu(B)
    until(lambda: 'b.sh' in queue.names('complete'))
    assert 'driver is' not in poller.log()
    assert queue.out('b.sh.stdout') == f'{B} {B} PCI_BUS_ID\n'  # CUDA counts those that are left anew


def test_a_gpu_that_nvidia_smi_cannot_list_costs_the_others_nothing_but_their_numbers(smi, queue):
    smi.lose(A)
    (smi.path / 'noise').write_text('Unable to determine the device handle for GPU0: 0000:01:00.0: Unknown Error\n')
    queue.add('a.sh', SEES)
    status, log = queue.poll('--exit', '1')
    assert status == 0
    assert 'gpu 1 unusable: nvidia-smi cannot reach it\n' in log
    assert queue.out('a.sh.stdout') == f'{B} {B} PCI_BUS_ID\n'


def test_a_gpu_in_mig_mode_is_not_used_through_nvidia_smi(smi, queue):
    smi.gpu(A, mig='Enabled')
    queue.add('a.sh', SEES)
    status, log = queue.poll('--exit', '1')
    assert status == 0
    assert 'gpu 0 unusable: is in MIG mode, for which this needs nvidia-ml-py' in log
    assert queue.out('a.sh.stdout') == f'{B} {B} PCI_BUS_ID\n'


@pytest.mark.parametrize('text', ['No devices were found', '<nvidia_smi_log>', ''])
def test_what_nvidia_smi_should_not_say_is_one_line(smi, queue, text):
    (smi.path / 'bin' / 'nvidia-smi').write_text(f'#!/bin/sh\nprintf %s {shlex.quote(text)}\n')
    status, log = queue.poll('--exit', '1')
    assert status == 2
    text = text or 'nvidia-smi: status 0'
    assert log.endswith(f'no NVIDIA driver found ({text}); --workers N runs without GPUs\n')
    assert log.count('\n') == 2


def test_without_both_one_line_tells_both_remedies(smi, queue, monkeypatch):
    (smi.path / 'bin' / 'nvidia-smi').unlink()
    if shutil.which('nvidia-smi'):
        pytest.skip('a real nvidia-smi is here')
    status, log = queue.poll('--exit', '1')
    assert status == 2
    assert log == ('fastgpu_poll: no NVIDIA driver found: install the driver, which brings '
                   'nvidia-smi, or if it is here pip install nvidia-ml-py; --workers N runs without GPUs\n')


# --- GPUs: a real one -------------------------------------------------------------------------------------------------

def real_gpu():
    try:
        import pynvml
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except Exception:
        return False


CUDA_JOB = """#!{python}
import ctypes, os, time
cuda = ctypes.CDLL('libcuda.so.1')
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for code in (cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0),
             cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
             cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(2 << 30))):
    assert code == 0, code
print('ready', flush=True)
while not os.path.exists({gate!r}):
    time.sleep(0.01)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not real_gpu(), reason='NVML finds no GPU here')
def test_a_real_gpu_is_busy_while_a_cuda_job_is_on_it_and_free_right_after(queue, tmp_path, monkeypatch):
    pool = ResourcePoolGPU(queue.path)
    ident = pool.lock_next()
    if ident is None:
        pytest.skip('all GPUs are in use')
    queue.add('a.py', head=CUDA_JOB.format(python=sys.executable, gate=str(queue.path / 'gate')))
    assert pool.run('a.py', ident)
    until(lambda: queue.has_out('a.py.stdout') or queue.has_out('a.py.stderr'))
    assert queue.out('a.py.stderr') == ''
    gpu = pool._places[ident][0]
    monkeypatch.setenv('FASTGPU_LOCK_DIR', str(tmp_path))  # somebody who knows nothing of our locks
    other = ResourcePoolGPU(tmp_path / 'other')
    assert not other.is_available(ident)
    assert re.match(r'busy: [0-9.]+ GiB used by pid ', other.reasons[ident])
    used, total = pool._driver.memory(gpu)
    assert used > 2048
    if shutil.which('nvidia-smi'):
        smi_used, smi_total = fastgpu.NvidiaSmi().memory(gpu)
        assert abs(used - smi_used) < 64
        assert abs(total - smi_total) < 1024
        assert len(fastgpu.NvidiaSmi().pids(gpu)) == len(pool._driver.pids(gpu))
    queue.open_gate()
    assert pool.poll_scripts() == 0
    assert other.is_available(ident)
    assert queue.record('a.py')['ids'] == [ident]


# --- API: a pool in one's own Python ----------------------------------------------------------------------------------

def test_lock_and_find_next(wp):
    wp.unlock(0)
    assert wp.find_next() == 0
    assert wp.lock(0)
    assert wp.find_next() == 1
    assert wp.lock_next() == 1
    assert wp.find_next() == 2
    assert not wp.is_available(0)
    wp.unlock(0)
    assert wp.find_next() == 0
    assert not wp.lock(1)


def test_lock_next_with_all_locked(wp):
    assert [wp.lock_next() for _ in range(5)] == [0, 1, 2, 3, None]
    assert wp.find_next() is None


def test_poll_scripts_runs_links_and_leaves_folders(tmp_path):
    for name, body in ('script_succ.sh', 'echo $FASTGPU_ID'), ('script_fail.sh', 'exit 1'):
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    pool = FixedWorkerPool([0], tmp_path / 'q')
    for name in 'script_succ.sh', 'script_fail.sh':
        (tmp_path / 'q' / 'to_run' / name).symlink_to(f'../../{name}')
    (tmp_path / 'q' / 'to_run' / 'folder').mkdir()
    assert pool.poll_scripts() == 1
    out = tmp_path / 'q' / 'out'
    assert (out / 'script_fail.sh.exitcode').read_text() == '1'
    assert (out / 'script_succ.sh.exitcode').read_text() == '0'
    assert (out / 'script_succ.sh.stdout').read_text() == '0\n'
    assert (tmp_path / 'q' / 'fail' / 'script_fail.sh').is_symlink()
    assert (tmp_path / 'q' / 'complete' / 'script_succ.sh').is_symlink()
    assert os.listdir(tmp_path / 'q' / 'to_run') == ['folder']
    assert (pool.completed, pool.failed) == (['script_succ.sh'], ['script_fail.sh'])


def test_each_poll_counts_for_itself(wp, capsys):
    queue = Queue(wp.path)
    for code, counts in (1, '0 complete, 1 fail'), (0, '1 complete, 0 fail'):
        queue.add(f'{code}.sh', f'exit {code}')
        assert wp.poll_scripts() == code
        assert counts in capsys.readouterr().err


def test_importing_has_no_side_effects(tmp_path):
    code = ('import os, signal, sys, threading; before = dict(os.environ), signal.getsignal(signal.SIGINT); '
            'import fastgpu; assert before == (dict(os.environ), signal.getsignal(signal.SIGINT)); '
            'assert threading.active_count() == 1; assert "pynvml" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True,
                   env={**os.environ, 'PYTHONPATH': str(MODULE.parent)})
    assert os.listdir(tmp_path) == []


def test_a_pool_of_ones_own(tmp_path):
    class Ports(ResourcePoolBase):
        def all_ids(self):
            return [8000, 8001, 8002]

        def is_available(self, ident):
            return super().is_available(ident) and ident != 8001

        def environment(self, ident):
            return {**super().environment(ident), 'PORT': str(ident)}

    queue = Queue(tmp_path / 'q')
    for name in 'ab':
        queue.add(name, queue.gate() + 'echo $PORT $FASTGPU_ID')
    pool = Ports(queue.path)
    for name in 'ab':
        assert pool.run(queue.path / 'to_run' / name, pool.lock_next())
    assert pool.lock_next() is None
    queue.open_gate()
    assert pool.poll_scripts() == 0
    assert queue.out('a.stdout') + queue.out('b.stdout') == '8000 8000\n8002 8002\n'


def test_run_locks_what_is_not_locked_and_tells_of_a_script_that_is_gone(wp):
    queue = Queue(wp.path)
    queue.add('a.sh')
    assert wp.run(queue.path / 'to_run' / 'a.sh', 2)
    assert not wp.run(queue.path / 'to_run' / 'a.sh', 3)
    assert wp.is_available(3)
    assert wp.poll_scripts() == 0
    assert queue.record('a.sh')['ids'] == [2]


@pytest.mark.skipif(not hasattr(os, 'pidfd_open'), reason='this Python or kernel has no pidfd')
def test_the_end_of_a_script_wakes_its_poller(queue):
    queue.add('a.sh', 'sleep 0.2')
    queue.add('b.sh', 'sleep 0.2')
    poll = f'import fastgpu; fastgpu.FixedWorkerPool([0], {str(queue.path)!r}).poll_scripts(poll_interval=600)'
    subprocess.run([sys.executable, '-c', poll], cwd=MODULE.parent, check=True, timeout=60)
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'complete'}


def test_a_pool_keeps_what_its_user_had_locked_before_it_polled(queue):
    queue.add('a.sh')
    pool = FixedWorkerPool([0, 1], queue.path)
    assert pool.lock(0)
    assert pool.poll_scripts() == 0
    assert queue.record('a.sh')['ids'] == [1]
    assert (list(pool.claims.locks), FixedWorkerPool([0], queue.path).lock_next()) == ([0], None)


def test_children_that_nobody_may_wait_for_are_no_success(queue):
    api = ('import fastgpu, signal, sys\nfastgpu.LOOK_AROUND = 0.2\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n'
           'sys.exit(fastgpu.FixedWorkerPool([0], ".").poll_scripts())')
    queue.add('a.sh', 'exit 3')
    queue.add('b.sh')
    run = subprocess.run([sys.executable, '-c', api], cwd=queue.path, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(MODULE.parent)}, timeout=60)
    assert queue.all() == {'a.sh': 'fail', 'b.sh': 'complete'}, run.stderr
    assert run.returncode == 1


# --- Stopping in order ------------------------------------------------------------------------------------------------

def test_ctrl_c_lets_what_runs_finish_and_starts_nothing(queue):
    queue.add('a.sh', 'echo ready; ' + queue.gate())
    queue.add('b.sh')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    poller.send_signal(signal.SIGINT)
    until(lambda: 'interrupted: waiting for 1 script; Ctrl-C again stops them' in poller.log())
    queue.open_gate()
    assert poller.wait(30) == 130
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'to_run'}
    assert poller.log().count('interrupted') == 1


@pytest.mark.parametrize('times', [1, 2])
def test_ctrl_c_in_the_api_drains_and_stops_as_in_the_command(queue, times):
    queue.add('a.sh', queue.gate() if times == 1 else f'cd {queue.q}; [ -e ran ] || {{ touch ran; sleep 100; }}')
    queue.add('b.sh')
    api = ('import fastgpu, signal\npool = fastgpu.FixedWorkerPool([0], ".")\nfirst = pool.poll_scripts()\n'
           'print(first, signal.getsignal(signal.SIGINT) == signal.default_int_handler, pool.poll_scripts())')
    with open(queue.path / 'api.log', 'w') as log:
        poller = subprocess.Popen([sys.executable, '-c', api], cwd=queue.path, stdout=log, stderr=log,
                                  env={**os.environ, 'PYTHONPATH': str(MODULE.parent)})
    queue.pollers.append(poller)
    queue.pid('a.sh')
    text = (queue.path / 'api.log').read_text
    poller.send_signal(signal.SIGINT)
    until(lambda: 'interrupted: waiting for 1 script; Ctrl-C again stops them' in text())
    if times == 2:
        until(lambda: (queue.path / 'ran').exists())
        poller.send_signal(signal.SIGINT)
    queue.open_gate()
    assert poller.wait(30) == 0
    assert text().endswith('130 True 0\n')
    assert 'Traceback' not in text()
    assert queue.all() == {'a.sh' if times == 1 else 'a-1.sh': 'complete', 'b.sh': 'complete'}


def test_a_signal_with_nothing_running_ends_the_poller_without_ado(queue):
    poller = queue.start('--workers', '1', '--exit', '0')
    queue.let_look(poller)
    poller.send_signal(signal.SIGINT)
    assert poller.wait(30) == 130
    assert poller.log().splitlines()[-1].endswith(f'nothing to run in {queue.path}/to_run')


def test_a_signal_is_heeded_while_there_is_always_something_to_start(gpus, queue):
    queue.change(LOOK_AROUND=600)  # which would interrupt that too
    for gpu in gpus.gpus:
        gpu['delay'] = 0.05
    gpus.save()
    for n in range(60):
        queue.add(f'{n:02}')
    poller = queue.start('--exit', '1')
    until(lambda: queue.names('complete'))
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143
    assert len(queue.names('to_run')) > 20


def test_a_signal_is_heeded_between_two_questions_to_a_driver_that_hangs(gpus, queue):
    gpus.have(3)
    for number in range(3):
        gpus.change(number, delay=1)
    queue.add('a.sh', '#SBATCH --gpus=3\n')
    poller = queue.start('--exit', '0')
    until(lambda: gpus.calls('memory'))
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143
    assert len(gpus.calls('memory')) == 1
    assert queue.names('to_run') == ['a.sh']


def test_a_signal_during_the_last_question_to_a_driver_starts_nothing(gpus, queue):
    queue.change(LOOK_AROUND=0.2)
    gpus.set({'uuid': A, 'used': 9000})
    queue.add('a.sh')
    poller = queue.start('--exit', '0')
    until(lambda: 'gpu 0 busy' in poller.log())
    gpus.change(0, used=0, field_delay=1)
    asked = len(gpus.calls('field'))
    until(lambda: len(gpus.calls('field')) > asked)
    poller.terminate()
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'to_run'}
    assert ': start' not in poller.log()


def test_a_signal_while_nvidia_smi_answers_starts_nothing(smi, queue):
    command = smi.path / 'bin' / 'nvidia-smi'
    slow = f'if [ "$3" = -i ]; then touch asked; {queue.gate()} fi\n[ -e broken ]'
    command.write_text(command.read_text().replace('[ -e broken ]', slow))
    queue.add('a.sh')
    poller = queue.start('--exit', '0')
    until((smi.path / 'asked').exists)
    poller.terminate()
    queue.open_gate()
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'to_run'}


@pytest.mark.parametrize('folder', ['running', 'to_run'])
def test_a_stop_is_heeded_while_the_queue_cannot_be_seen(queue, tmp_path, folder):
    queue.change(LOOK_AROUND=0.2)
    env, away, _ = failing(tmp_path, 'listdir', folder)
    queue.add('a.sh', 'exec sleep 1000')
    poller = queue.start('--workers', '1', env=env)
    queue.pid('a.sh')
    away.touch()
    until(lambda: 'cannot see the queue now' in poller.log())
    poller.terminate()
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'to_run'}
    assert ('cannot see what is left in to_run: ' in poller.log()) == (folder == 'to_run')


@pytest.mark.parametrize(('signals', 'status'), [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)])
def test_stop_terminates_requeues_what_failed_and_collects_what_ended_well(queue, signals, status):
    queue.add('dies.sh', 'echo ready; sleep 1000')
    queue.add('saves.sh', TRAP.format(0))
    queue.add('fails.sh', TRAP.format(9))
    queue.add('waits.sh')
    poller = queue.start('--workers', '3')
    until(lambda: all(queue.has_out(f'{name}.sh.stdout') for name in ('dies', 'saves', 'fails')))
    for signum in signals:
        poller.send_signal(signum)
        until(lambda: 'interrupted' in poller.log() or 'stopping' in poller.log())
    assert poller.wait(30) == status
    assert 'stopping 3 scripts: TERM now, KILL in 10 s' in poller.log()
    assert queue.all() == {'dies.sh': 'to_run', 'fails.sh': 'to_run', 'saves.sh': 'complete', 'waits.sh': 'to_run'}
    assert queue.out('dies.sh.exitcode') == '143'
    assert queue.out('saves.sh.stdout') == queue.out('fails.sh.stdout') == 'ready\nsaved\n'


@pytest.mark.parametrize('first', ['script', 'poller', 'script of an earlier poller'])
def test_a_term_for_all_processes_at_once_puts_the_scripts_back_whoever_gets_it_first(queue, first):
    queue.add('a.sh', 'echo; kill -STOP $$; ' + queue.gate())
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    group = queue.pid('a.sh')
    if first == 'script of an earlier poller':
        kill(poller)
        poller = queue.start('--workers', '1')
        until(lambda: 'waiting for a.sh' in poller.log())
    if first == 'poller':
        poller.send_signal(signal.SIGSTOP)
        poller.send_signal(signal.SIGTERM)
    os.killpg(group, signal.SIGTERM)
    os.killpg(group, signal.SIGCONT)
    until(lambda: queue.has_out('a.sh.exitcode'))
    poller.send_signal(signal.SIGCONT if first == 'poller' else signal.SIGTERM)
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'to_run'}


def test_the_scripts_of_an_earlier_poller_that_run_on_are_named_when_one_is_stopped(queue):
    queue.add('a.sh', queue.gate())
    first = queue.start('--workers', '1')
    queue.pid('a.sh')
    kill(first)
    second = queue.start('--workers', '1')
    until(lambda: 'waiting for a.sh, which runs without this poller' in second.log())
    second.terminate()
    assert second.wait(30) == 143
    assert 'still running, and the next fastgpu_poll collects it: a.sh\n' in second.log()
    assert 'nothing to run' not in second.log()
    queue.open_gate()


def test_stop_kills_what_ignores_term(queue, monkeypatch):
    monkeypatch.setattr(fastgpu, 'GRACE', 0.2)
    queue.add('a.sh', 'trap "" TERM; while :; do sleep 0.01; done')
    pool = FixedWorkerPool([0], queue.path)
    assert pool.run('a.sh', 0)
    until(lambda: b'sleep' in subprocess.check_output(['ps', '-o', 'args=', '-g', str(queue.pid('a.sh'))]))
    pool.interrupt(signal.SIGTERM)
    assert pool.poll_scripts() == 143
    assert queue.all() == {'a.sh': 'to_run'}
    assert pool.find_next() == 0
    assert not os.path.exists(f'/proc/{queue.record("a.sh")["pid"]}')


def test_grandchildren_die_with_a_script_that_is_stopped(queue):
    queue.change(LOOK_AROUND=0.2)
    queue.add('a.sh', '(trap "" TERM; sh -c "echo \\$PPID"; while :; do sleep 0.01; done) & wait')
    poller = queue.start('--workers', '1')
    grandchild = int(until(lambda: queue.has_out('a.sh.stdout')))
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'to_run'}
    until(lambda: not alive(grandchild))


def test_stopping_reaches_through_a_wrapper_that_makes_a_process_group_of_its_own(queue):
    queue.change(GRACE=1)
    queue.add('a.sh', f'trap "echo saved; exit 0" TERM; echo start; {queue.gate()}')
    queue.add('b.sh', f'trap "" TERM; echo $$; {queue.gate()}')
    poller = queue.start('--workers', '2', '--wrapper', 'timeout 600')
    until(lambda: queue.has_out('a.sh.stdout') and queue.has_out('b.sh.stdout'))
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'complete', 'b.sh': 'to_run'}
    assert set(queue.out('a.sh.stdout').split()) == {'start', 'saved'}  # more than once: timeout passes TERM on as well
    until(lambda: not alive(queue.out('b.sh.stdout').strip()))


def test_a_poller_killed_while_it_stops_requeues_all_the_same(queue):
    queue.add('a.sh', 'trap "echo caught; sleep 0.5; exit 1" TERM; echo ready; while :; do sleep 0.01; done')
    poller = queue.start('--workers', '1')
    until(lambda: queue.has_out('a.sh.stdout'))
    poller.send_signal(signal.SIGTERM)
    until(lambda: 'caught' in queue.out('a.sh.stdout'))
    kill(poller)
    until(lambda: queue.has_out('a.sh.exitcode'))
    poller = queue.start('--workers', '1')
    until(lambda: 'requeue a.sh (status 1' in poller.log())
    until(lambda: queue.has_out('a-1.sh.stdout'))  # what is about to start would be overlooked when the test cleans up


def test_what_cannot_be_collected_does_not_keep_the_poller_from_being_stopped(queue):
    queue.add('a.sh', 'exit 3')
    (queue.path / 'fail').rmdir()
    (queue.path / 'fail').touch()
    poller = queue.start('--workers', '1', command=(sys.executable, '-c', (
        'import fastgpu, sys; fastgpu.check_usable = lambda *_: None\n'
        'fastgpu.setup_dirs = lambda p: [fastgpu.Path(p) / n for n in "to_run running complete fail out".split()]\n'
        'sys.exit(fastgpu.main())')), cwd=MODULE.parent)
    until(lambda: 'cannot collect a.sh now: ' in poller.log())
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(fastgpu.GRACE + 5) == 143  # not only when it gives up on what it killed
    assert queue.names('running') == ['a.sh']
    (queue.path / 'fail').unlink()
    assert queue.poll()[0] == 1
    assert queue.all() == {'a.sh': 'fail'}  # it failed before it was stopped


# --- Slurm: as its steps, and in its allocations ----------------------------------------------------------------------

def has_slurm():
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(['sinfo', '-h'], capture_output=True, timeout=10).returncode == 0


slurm = pytest.mark.skipif(not has_slurm(), reason='no Slurm answers here')
NODES = ['srun', '--nodes=3', '--ntasks-per-node=1']
STEP = 'srun --ntasks=1 --gpus=1'


@slurm
def test_slurm_three_pollers_on_three_nodes_run_each_script_once(queue):
    for number in range(60):
        queue.add(f'{number:02}.sh', f'echo {number} >> {queue.q}/ran; hostname; sleep 0.1; exit {number % 2}')
    poller = queue.start('--workers', '2', command=(*NODES, *COMMAND))
    assert poller.wait(60) == 1
    assert len(set((queue.path / 'ran').read_text().split())) == len((queue.path / 'ran').read_text().split()) == 60
    assert Counter(queue.all().values()) == {'complete': 30, 'fail': 30}
    hosts = {queue.out(name).strip() for name in queue.names('out') if name.endswith('.stdout')}
    assert len(hosts) == 3
    for host in hosts:
        assert re.search(rf' {host} worker [01]: complete ', poller.log())
        assert re.search(rf' {host}: \d+ scripts in ', poller.log())


@slurm
def test_slurm_runs_each_script_as_a_step_with_a_gpu_of_its_own_and_its_status_comes_back(queue):
    for number in range(30):
        queue.add(f'{number:02}.sh', 'date +%s%N; hostname; echo $CUDA_VISIBLE_DEVICES; sleep 0.1; date +%s%N; '
                                     + ('kill -9 $$' if number == 7 else f'exit {number % 3}'))
    assert queue.poll('--workers', '12', '--wrapper', STEP)[0] == 1
    uses = {}
    for number in range(30):
        assert queue.out(f'{number:02}.sh.exitcode') == str(137 if number == 7 else number % 3)
        start, host, gpu, end = queue.out(f'{number:02}.sh.stdout').split()
        uses.setdefault((host, gpu), []).append((int(start), int(end)))
    assert len(uses) > 4  # on more than one node
    for spans in map(sorted, uses.values()):
        assert all(later[0] > earlier[1] for earlier, later in zip(spans, spans[1:]))


@slurm
def test_slurm_steps_end_when_their_script_is_cancelled_or_the_poller_is_stopped(queue):
    for name in 'ab':
        queue.add(f'{name}.sh', f'echo $$; {queue.gate()}')
    poller = queue.start('--workers', '2', '--wrapper', STEP)
    until(lambda: queue.has_out('a.sh.stdout') and queue.has_out('b.sh.stdout'))
    os.rename(queue.path / 'running' / 'a.sh', queue.path / 'fail' / 'a.sh')
    until(lambda: 'cancelled a.sh' in poller.log())
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143
    assert queue.all() == {'a.sh': 'fail', 'b.sh': 'to_run'}
    for name in 'ab':
        until(lambda name=name: not alive(queue.out(f'{name}.sh.stdout').strip()))


@slurm
def test_slurm_steps_outlive_their_poller_and_the_next_one_collects_them(queue):
    queue.add('a.sh', f'echo start; {queue.gate()} exit 5')
    poller = queue.start('--workers', '2', '--wrapper', STEP)
    until(lambda: queue.has_out('a.sh.stdout'))
    kill(poller)
    queue.open_gate()
    until(lambda: queue.has_out('a.sh.exitcode'))
    assert queue.poll('--workers', '2', '--wrapper', STEP)[0] == 1
    assert queue.all() == {'a.sh': 'fail'}
    assert queue.out('a.sh.exitcode') == '5'


@slurm
def test_slurm_a_step_that_gets_term_before_its_time_is_up_puts_its_scripts_back(queue):
    for number in range(6):
        queue.add(f'{number}.sh', f'[ -e {queue.q}/again ] || {{ echo $$; {queue.gate()} }}')
    batch = queue.path / 'batch'
    batch.write_text('#!/bin/sh\n#SBATCH --nodes=3 --ntasks-per-node=1 --time=10\n'
                     f'srun "{sys.executable}" "{MODULE}" --path {queue.q} --workers 1\n')
    job = subprocess.run(['sbatch', '--parsable', '--output', queue.path / 'batch.log', batch], check=True,
                         capture_output=True, text=True).stdout.strip()
    until(lambda: len([number for number in range(6) if queue.has_out(f'{number}.sh.stdout')]) == 3)
    subprocess.run(['scancel', '--signal=TERM', job], check=True)  # what --signal=TERM@60 has Slurm do
    until(lambda: not subprocess.run(['squeue', '-h', '-j', job, '--states', 'PD,R,CG'],
                                     capture_output=True, text=True).stdout.strip())
    assert Counter(queue.all().values()) == {'to_run': 6}, (queue.path / 'batch.log').read_text()
    (queue.path / 'again').touch()
    assert queue.poll(command=(*NODES, *COMMAND))[0] == 0
    assert Counter(queue.all().values()) == {'complete': 6}


# --- Network file systems, with two hosts -----------------------------------------------------------------------------

NETFS = Path(os.environ.get('FASTGPU_NETFS', MODULE.parent.parent / 'shared' / 'netfs'))


class Net:
    """A network file system that two hosts mount; each is a machine of its own, by the ids that it is shown."""

    def __init__(self, kind):
        self.dir = Path(f'/tmp/netfs-test-{kind}-{os.getpid()}')
        self.queue = None
        self.kind = kind

    def up(self):
        subprocess.run([NETFS / 'netfs_up.sh', self.kind, self.dir], check=True, capture_output=True, timeout=300)
        for host, file in itertools.product('AB', ('/proc/sys/kernel/random/boot_id', '/etc/machine-id')):
            (self.dir / f'id-{host}').write_text(f'of {host}\n')
            self.on(host, 'mount', '--bind', self.dir / f'id-{host}', file)

    def down(self):
        subprocess.run([NETFS / 'netfs_down.sh', self.dir], capture_output=True, timeout=60)
        shutil.rmtree(self.dir, ignore_errors=True)

    def on(self, host, *words, **kwargs):
        return subprocess.run([self.dir / 'on', host, *words], check=True, capture_output=True, text=True, timeout=120,
                              **kwargs).stdout

    def command(self, host):
        return self.dir / 'on', host, *COMMAND

    def server(self, word):
        subprocess.run([self.dir / 'server', word], check=True, capture_output=True, timeout=60)

    def new_queue(self):
        """Return the folder of a new queue, as both hosts see it."""
        path = self.dir / 'mnt' / f'q{time.monotonic_ns()}'
        self.on('A', 'mkdir', path)
        self.on('A', sys.executable, '-c', f'import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import fastgpu; '
                                           f'fastgpu.setup_dirs({str(path)!r})')
        until(lambda: 'to_run' in self.on('B', 'ls', path))
        return path

    def fill(self, path, number, body):
        write = f'printf "%s\\n" "#!/bin/sh" {shlex.quote(body)} >$n; touch -d @1 $n; chmod +x $n'
        self.on('A', 'sh', '-c', f'cd {path}/to_run; for n in $(seq 1000 {999 + number}); do {write}; done')

    def start(self, host, path, *args, **kwargs):
        log = self.dir / f'{time.monotonic_ns()}.log'
        with open(log, 'w') as err:
            poller = subprocess.Popen([*self.command(host), '--path', path, *(args or ('--workers', '2'))], stderr=err,
                                      stdin=subprocess.DEVNULL, **kwargs)
        poller.log = log.read_text
        return poller

    def names(self, path, folder, host='A'):
        return self.on(host, 'ls', path / folder).split()


@pytest.fixture(scope='module', params=['gluster', 'sshfs'])
def net(request):
    if os.getuid() or not os.path.exists('/dev/fuse') or not (NETFS / 'netfs_up.sh').exists():
        pytest.skip('needs root, FUSE and netfs_up.sh')
    net = Net(request.param)
    try:
        net.up()
    except subprocess.SubprocessError as error:
        net.down()
        pytest.skip(f'there is no {request.param} here: {error}')
    yield net
    net.down()


@pytest.mark.net
def test_net_two_hosts_run_each_script_once(net):
    path = net.new_queue()
    ran = net.dir / 'ran'
    ran.touch()
    net.fill(path, 200, f'echo $0 >> {ran}')
    pollers = [net.start(host, path) for host in 'AB']
    assert [poller.wait(120) for poller in pollers] == [0, 0]
    assert len(net.names(path, 'complete')) == 200
    assert len(ran.read_text().split()) == 200
    assert not re.search('cannot|waits for its chmod', ''.join(poller.log() for poller in pollers))


@pytest.mark.net
def test_net_pollers_of_two_hosts_under_kill_9_lose_nothing(net):
    path, rng = net.new_queue(), random.Random(os.environ.get('SEED'))
    ran = net.dir / f'ran-{time.monotonic_ns()}'
    ran.touch()
    net.fill(path, 150, f'sleep 0.{rng.randrange(3)}; echo $0 >> {ran}')
    live, deadline = [], time.monotonic() + 30
    while time.monotonic() < deadline:
        live = [poller for poller in live if poller.poll() is None]
        while len(live) < 6:
            live.append(net.start(rng.choice('AB'), path, '--workers', '2', '--exit', '0'))
        time.sleep(rng.random())
        live.pop(rng.randrange(len(live))).kill()
    for poller in live:
        kill(poller)
    for host in 'AB':
        assert net.start(host, path).wait(120) == 0
    time.sleep(1)  # names are cached so long
    assert len(net.names(path, 'complete')) == 150
    assert len(ran.read_text().split()) == 150


@pytest.mark.net
def test_net_a_server_that_is_away_for_a_while_costs_no_script(net):
    path = net.new_queue()
    ran = net.dir / f'ran-{time.monotonic_ns()}'
    ran.touch()
    net.fill(path, 30, f'sleep 1; echo ${{0##*/}} >> {ran}')
    pollers = [net.start(host, path) for host in 'AB']
    until(lambda: len(ran.read_text().split()) > 3)
    net.server('stop')
    time.sleep(10)
    net.server('start')
    for poller in pollers:
        assert poller.wait(120) in (0, 1), poller.log()  # 1: it saw for seconds a name that the other one had moved
        assert 'was moved' not in poller.log().splitlines()[-1]
    for host in 'AB':
        assert net.start(host, path).wait(120) == 0
    # What another host moved is seen late. One that started just then could not even be read: that is status 126, but
    # dash takes a script that it cannot read for an empty one.
    until(lambda: len(net.names(path, 'complete') + net.names(path, 'fail')) == 30)
    failed = net.names(path, 'fail')
    assert [net.on('A', 'cat', path / 'out' / f'{name}.exitcode') for name in failed] == ['126'] * len(failed)
    ended = ran.read_text().split()
    assert len(ended) == len(set(ended))
    empty = set(net.names(path, 'complete')) - set(ended)
    assert len(failed) + len(empty) <= 4
    logs = ''.join(poller.log() for poller in pollers)
    assert all(f'complete {name} (status 0, 0.' in logs for name in empty)


@pytest.mark.net
def test_net_two_hosts_that_add_at_once_lose_no_command(net):
    for _ in range(10):
        path = net.new_queue()
        adding = [subprocess.Popen([*net.command(host), '--path', path, '--add'], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, cwd='/') for host in 'AB']
        for host, process in zip('AB', adding):
            process.stdin.write(''.join(f'echo {host}{n}\n' for n in range(200)))
        names = [process.communicate(timeout=120)[0].split() for process in adding]
        assert [process.returncode for process in adding] == [0, 0]
        assert len({*names[0], *names[1]}) == 400
        text = net.on('A', 'sh', '-c', f'cat {path}/to_run/*')
        assert len(set(re.findall('^echo (.*)', text, re.M))) == 400


@pytest.mark.net
def test_net_hosts_of_one_name_leave_each_others_runs_alone(net):
    net.on('B', 'hostname', 'nodeA')
    try:
        path = net.new_queue()
        ran = net.dir / f'ran-{time.monotonic_ns()}'
        ran.touch()
        net.fill(path, 8, f'sleep 3; echo $0 >> {ran}')
        pollers = [net.start(host, path) for host in 'AB']
        assert [poller.wait(120) for poller in pollers] == [0, 0]
        assert len(ran.read_text().split()) == 8
        assert len(net.names(path, 'complete')) == 8
    finally:
        net.on('B', 'hostname', 'nodeB')


@pytest.mark.net
def test_net_a_new_name_on_the_same_kernel_collects_what_ended(net):
    path = net.new_queue()
    net.fill(path, 1, 'sleep 2; exit 3')
    first = net.start('A', path)
    until(lambda: '"pid"' in net.on('A', 'sh', '-c', f'cat {path}/out/1000.json || true'))
    kill(first)
    net.on('A', 'hostname', 'another')
    try:
        until(lambda: '1000.exitcode' in net.names(path, 'out'))
        assert net.start('A', path).wait(60) == 1
        assert net.names(path, 'fail') == ['1000']
    finally:
        net.on('A', 'hostname', 'nodeA')


# --- Status: the log and the line of progress -------------------------------------------------------------------------

def test_the_log_of_a_failure_ends_with_its_last_words_and_the_summary_names_it(queue):
    queue.add('a.sh', 'echo "first" >&2; printf "  loss is \\033[31mnan  \\n\\n" >&2; exit 1')
    queue.add('b.sh', 'exit 2')
    queue.add('c.sh')
    status, log = queue.poll('--workers', '1', cwd=queue.path)
    assert status == 1
    assert re.search(r' worker 0: fail a.sh \(status 1, 0.. s\): loss is \\x1b\[31mnan \(out/a.sh.stderr\)\n', log)
    assert re.search(r' worker 0: fail b.sh \(status 2, 0.. s\): said nothing \(out/b.sh.stderr\)\n', log)
    assert re.search(r' 3 scripts in .* s \(0.. s of worker time\): 1 complete, 2 fail\n\S+ failed: a.sh b.sh\n$', log)
    assert log.index('complete c.sh') > log.index('start c.sh') > log.index('fail b.sh')


def test_a_progress_bar_is_no_last_line(queue):
    queue.add('a.sh', 'printf "10%%\\r20%%\\r30%%\\r" >&2; exit 1')
    assert re.search(r'fail a.sh \(status 1, \d.\d s\): 30% \(', queue.poll()[1])


def test_paths_in_the_log_are_short_where_they_lie_below_the_current_folder(queue):
    queue.add('a.sh', 'exit 3')
    assert queue.poll(cwd=queue.path)[1].count('s): said nothing (out/a.sh.stderr)\n') == 1


def test_no_name_of_a_script_is_taken_for_a_word_of_ours(queue, tmp_path):
    queue.change(LOOK_AROUND=0.1)
    env, away, times = failing(tmp_path, 'stat', 'out/z.sh.json')
    away.touch()
    names = 'queue', 'start', 'stop'  # as what there is to say is called inside of it
    for name in names:
        queue.add(name, mode=0o644)
    queue.add('z.sh')
    poller = queue.start('--workers', '1', env=env)
    until(lambda: times() > 5)
    for said in 'cannot start z.sh now: ', *(f'to_run/{name} waits for its chmod' for name in names):
        assert poller.log().count(said) == 1, said


def test_a_log_that_nobody_reads_stops_nothing(queue):
    queue.add('a.sh')
    read, write = os.pipe()
    os.close(read)
    poller = subprocess.Popen([*COMMAND, '--path', str(queue.path), '--workers', '1'], stderr=write)
    os.close(write)
    assert poller.wait(30) == 0
    assert queue.all() == {'a.sh': 'complete'}


@pytest.mark.parametrize('kind', ['pipe', 'terminal'])
def test_a_log_whose_reader_has_stopped_stops_nothing_and_counts_what_was_lost(queue, kind):
    read, write = os.pipe() if kind == 'pipe' else pty.openpty()
    if kind == 'pipe':
        fcntl.fcntl(write, F_SETPIPE_SZ, 4096)
    else:
        os.write(read, b'\x13')  # Ctrl-S
    poller = subprocess.Popen([*COMMAND, '--path', str(queue.path), '--workers', '1', '--exit', '0'],
                              stderr=write, env={**os.environ, 'TERM': 'dumb'})
    queue.pollers.append(poller)
    for number in range(60):
        queue.add(f'{number}.sh')
    until(lambda: len(queue.names('complete')) == 60)
    if kind == 'terminal':
        os.write(read, b'\x11')  # Ctrl-Q
    log = ''

    def told():
        nonlocal log
        if select.select([read], [], [], 0)[0]:
            log += os.read(read, 1 << 16).decode()
        queue.add(f'{time.time()}.sh')
        return re.search(r'\(\d+ lines of this log lost: nobody read it\)', log)

    until(told)
    os.write(read, b'\x13') if kind == 'terminal' else None
    poller.terminate()
    assert poller.wait(30) == 143
    os.close(read)
    os.close(write)


def test_a_terminal_that_is_never_read_stops_nothing(queue):
    ours, theirs = pty.openpty()
    poller = subprocess.Popen([*COMMAND, '--path', str(queue.path), '--workers', '2'], stderr=theirs,
                              env={**os.environ, 'TERM': 'dumb'})
    queue.pollers.append(poller)
    for number in range(120):
        queue.add(f'{number:03}-{"long" * 50}.sh')
    assert poller.wait(60) == 0
    os.close(ours)
    os.close(theirs)


def on_a_terminal(queue, columns=60, **env):
    """Return what a poller writes to a terminal while a script ends, one fails and one waits for the gate."""
    queue.add('0.sh')
    queue.add('a.sh', 'exit 1')
    queue.add('b.sh', queue.gate())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    poller = subprocess.Popen([*COMMAND, '--workers', '1', '--path', str(queue.path)], stderr=theirs,
                              env={**os.environ, 'TERM': 'xterm', 'NO_COLOR': '', **env})
    queue.pollers.append(poller)
    os.close(theirs)
    until(lambda: queue.names('running') == ['b.sh'])
    queue.open_gate()
    text = b''
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while True:
            text += os.read(ours, 4096)
    os.close(ours)
    assert poller.wait(30) == 1
    return text.decode()


def test_a_terminal_has_a_line_of_progress_below_the_log_as_wide_as_it_is(queue):
    text = on_a_terminal(queue, columns=30)
    assert '\r\033[K2/3 done (1 failed), 1 running'[:4 + 29] in text
    assert re.search(r'\r\033\[K\033\[31m\S+ worker 0: fail a.sh .*\033\[0m\r\n', text)
    assert all(len(part) < 30 for part in re.findall(r'\r\033\[K(\d+/\d+ done[^\r\n]*)', text))
    assert re.search(r' failed: a.sh\033\[0m\r\n$', text)  # and no line of progress is left


def test_a_terminal_that_tells_no_width_is_taken_for_80_columns(queue):
    assert re.search(r'2/3 done \(1 failed\), 1 running, about [0-9.]+ s left', on_a_terminal(queue, columns=0))


def test_colours_and_progress_can_be_refused(queue):
    assert '\033[31m' not in on_a_terminal(queue, NO_COLOR='1')
    shutil.rmtree(queue.path)
    queue = Queue(queue.path)
    assert '\033' not in on_a_terminal(queue, TERM='dumb')


def test_a_log_in_a_file_has_neither_progress_nor_colours(queue):
    queue.add('a.sh', 'exit 1')
    log = queue.poll(env={**os.environ, 'TERM': 'xterm'})[1]
    assert 'fail a.sh' in log
    assert '\033' not in log
    assert '\r' not in log


# --- Status: --status -------------------------------------------------------------------------------------------------

def test_status_of_an_empty_queue(gpus, queue):
    as_json, text = status(queue)
    assert as_json == {
        'path': str(queue.path), 'host': os.uname().nodename, 'pollers': [], 'counts': dict.fromkeys(FOLDERS, 0),
        'elsewhere': [], 'next': [], 'held': [], 'failed': [], 'seconds_left': None,
        'resources': [{'kind': 'gpu', 'id': number, 'name': str(number), 'state': 'free', 'reason': None,
                       'model': 'NVIDIA H100', 'memory_used': 500, 'memory_total': 81920, 'script': None, 'user': None,
                       'seconds': None}
                      for number in range(2)]}
    assert text == ('gpu 0  NVIDIA H100  0.5 of 80.0 GiB  free\n'
                    'gpu 1  NVIDIA H100  0.5 of 80.0 GiB  free\n'
                    'to_run 0 · running 0 · complete 0 · fail 0 · no poller on ' + os.uname().nodename + '\n')
    assert not list(gpus.locks.iterdir())


def test_status_while_scripts_run_and_after_their_poller_was_killed(gpus, queue):
    queue.change(LOOK_AROUND=0.2)
    gpus.have(4)
    gpus.change(1, pids=[2**22 + 1], used=4096)
    gpus.change(2, memory=15)
    other = Queue(queue.path.parent / 'other')
    other.add('theirs.sh', other.gate())
    gpus.change(0, used=2000)
    other.start('--exit', '1')
    until(lambda: other.names('running'))  # on GPU 3
    gpus.change(0, used=500)
    for number in range(5):
        queue.add(f'{number}.sh', 'echo "bad luck" >&2; exit 1')
    queue.add('5.sh', 'sleep 0.3')
    assert queue.poll('--workers', '1')[0] == 1
    for name in 'abcde':
        queue.add(f'{name}.sh', queue.gate())
    poller = queue.start('--exit', '1')
    until(lambda: queue.names('running'))
    for alive in True, False:
        as_json, text = status(queue)
        assert bool(as_json['pollers']) is alive
        states = [resource['state'] for resource in as_json['resources']]
        assert states == ['running', 'busy', 'unusable', 'busy']
        assert as_json['resources'][0]['script'] == 'a.sh'
        assert as_json['counts'] == {'to_run': 4, 'running': 1, 'complete': 1, 'fail': 5}
        assert as_json['next'] == ['b.sh', 'c.sh', 'd.sh']
        assert [failed['script'] for failed in as_json['failed']] == ['4.sh', '3.sh', '2.sh']
        took = queue.record('5.sh')['finished'] - queue.record('5.sh')['started']
        assert as_json['seconds_left'] == (pytest.approx(4.5 * took, abs=0.3) if alive else None)  # by that alone
        user = as_json['resources'][0]['user']
        for line in (rf'gpu 0  NVIDIA H100  0.5 of 80.0 GiB  a.sh, {user}, \d+\.\d s',
                     f'gpu 1  NVIDIA H100  4.0 of 80.0 GiB  busy: 4.0 GiB used by pid {2**22 + 1}',
                     'gpu 2 .*unusable: GPU is lost',
                     r'gpu 3 .* busy: runs theirs.sh of yours \(pid \d+, .*/other\) for \d+\.\d s',
                     'failed: 4.sh: bad luck \\(.*/out/4.sh.stderr\\)',
                     f'fail 5 · {"1 poller on .* · about .* left" if alive else "no poller on .*"}'):
            assert re.search(f'^.*{line}$', text, re.M), (line, text)
        kill(poller)
    for some in queue, other:
        some.open_gate()
    resource = until(lambda: [row for row in status(queue)[0]['resources'] if row['state'] == 'ended'])[0]
    assert resource['script'] == 'a.sh'
    assert f'a.sh, {user}: ended, the next fastgpu_poll collects it\n' in status(queue)[1]


def test_status_of_slots_and_of_other_hosts(queue, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.setenv('PYTHONPATH', '/nowhere')
    queue.add('a.sh', queue.gate())
    poller = queue.start('--workers', '2', env={**os.environ, 'PATH': '/usr/bin:/bin'})
    until(lambda: queue.names('running') and 'pid' in queue.record('a.sh'))
    (queue.path / 'running' / 'far.sh').touch()
    (queue.path / 'out' / 'far.sh.json').write_text(json.dumps(
        {'script': 'far.sh', 'host': 'far\033', 'kind': 'gpu', 'ids': [7], 'started': time.time() - 3700}))
    as_json, text = status(queue, '--workers', '2')
    assert [resource['state'] for resource in as_json['resources']] == ['running', 'free']
    assert [run['script'] for run in as_json['elsewhere']] == ['far.sh']
    assert re.search(r'^on far\\x1b +far.sh, \w+, 1:01:4\d$', text, re.M)
    assert status(queue)[0]['resources'][0]['script'] == 'a.sh'
    assert poller.poll() is None
    queue.open_gate()


def test_status_sees_a_further_place_on_a_gpu_as_a_poller_does(gpus, queue):
    gpus.set({'uuid': A, 'total': 10240})
    first = ResourcePoolGPU(queue.path, per_gpu=2)
    assert first.lock_next() == 0
    gpus.change(0, used=3000, pids=[4121])
    as_json, _ = status(queue, '--per-gpu', '2')
    assert [row['state'] for row in as_json['resources']] == ['busy', 'free']
    assert first.lock_next() == '0.1'


@pytest.mark.skipif(os.getuid() != 0, reason='only root can try it as somebody else')
def test_status_is_for_other_users_too_and_says_what_they_may_not_see(queue):
    queue.add('a.sh')
    with tempfile.TemporaryDirectory() as path:  # tmp_path is hidden from others
        os.chmod(path, 0o755)
        shutil.copytree(queue.path, Path(path, 'q'))
        command = [sys.executable, '-c', AS_NOBODY, '--path', f'{path}/q', '--status', '--workers', '1']
        shown = subprocess.run(command, capture_output=True, text=True, cwd=MODULE.parent)
        assert (shown.returncode, shown.stderr) == (0, '')
        assert 'next: a.sh' in shown.stdout
        os.chmod(f'{path}/q/fail', 0o700)
        shown = subprocess.run(command, capture_output=True, text=True, cwd=MODULE.parent)
        assert (shown.returncode, shown.stderr) == (2, f'fastgpu_poll: {path}/q/fail: Permission denied\n')


def test_status_tells_the_pids_of_the_pollers(queue):
    pollers = [queue.start('--exit', '0', '--workers', '1') for _ in '12']
    pids = sorted(poller.pid for poller in pollers)
    until(lambda: status(queue, '--workers', '1')[0]['pollers'] == pids)
    assert f' · 2 pollers on {os.uname().nodename} (pid {pids[0]}, {pids[1]})' in status(queue, '--workers', '1')[1]
    kill(pollers[0])
    assert status(queue, '--workers', '1')[0]['pollers'] == [pollers[1].pid]
    others = [take_lock(fastgpu.Queue(queue.path).alive, pid, 1) for pid in (4194303, 3, 4194301, 2)]
    assert status(queue, '--workers', '1')[0]['pollers'] == [2, 3, pollers[1].pid, 4194301, 4194303]
    for fd in others:
        os.close(fd)


def test_a_lock_of_all_pids_is_not_taken_for_endless_pollers(queue):
    path = f'{queue.path}/.{os.uname().nodename}.poller'
    fd = fastgpu.open_lock(path)
    assert fastgpu.Place(path, 0, 1 << 22).lock(fd)
    assert len(status(queue, '--workers', '1')[0]['pollers']) == 1
    os.close(fd)


def test_status_of_what_is_no_queue(tmp_path):
    command = [*COMMAND, '--path', str(tmp_path), '--status', '--workers', '1']
    shown = subprocess.run(command, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (2, '')
    assert shown.stderr == f'fastgpu_poll: {tmp_path} is no queue: it has no folder to_run (fastgpu_poll makes one)\n'
    assert not list(tmp_path.iterdir())


def test_status_of_a_queue_that_has_only_its_first_folder(queue):
    for name in 'a.sh', 'b.sh':
        queue.add(name, mode=0o755 if name == 'a.sh' else 0o644)
    for folder in 'running', 'complete', 'fail', 'out':
        (queue.path / folder).rmdir()
    as_json, text = status(queue, '--workers', '1')
    assert as_json['counts'] == {'to_run': 2, 'running': 0, 'complete': 0, 'fail': 0}
    assert (as_json['next'], as_json['held']) == (['a.sh'], ['b.sh'])
    assert 'next: a.sh\nheld until chmod +x: b.sh\n' in text


def test_status_of_edited_records_is_no_traceback(queue):
    for number, change in enumerate(({'pid': '\0'}, {'finished': float('inf')}, {'finished': 'x'}, {'ids': [[]]})):
        queue.add(f'{number}.sh').rename(queue.path / 'running' / f'{number}.sh')
        record = {'script': 'a.sh', **fastgpu.this_host(), 'ids': [0], 'started': 1.0, **change}
        (queue.path / 'out' / f'{number}.sh.json').write_text(json.dumps(record))
    assert status(queue, '--workers', '1')[0]['counts']['running'] == 4


def test_status_shows_the_gpus_also_where_there_is_no_queue(gpus, tmp_path):
    text = run_command('--status', cwd=tmp_path, check=True).stdout
    assert re.match('gpu 0 .* free\ngpu 1 .* free\nto_run 0 ', text)
    assert not list(tmp_path.glob('to_run'))


def test_what_is_shown_ends_quietly_with_its_reader_and_fits_its_encoding(queue):
    queue.add('\N{SNOWMAN}.sh')
    command = [*COMMAND, '--path', str(queue.path), '--status', '--workers', '1']
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert (run.returncode, run.stderr) == (0, '')
    assert 'next: \'\\u2603.sh\'\n' in run.stdout
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, '')


# --- Command: its options, and the folder it uses ---------------------------------------------------------------------

def test_all_three_ways_to_use_it_do_the_same(tmp_path):
    alone = tmp_path / 'alone'
    alone.mkdir()
    shutil.copy(MODULE, alone)
    script = Path(sys.executable).with_name('fastgpu_poll')
    ways = [(sys.executable, '-m', 'fastgpu'), (sys.executable, str(alone / 'fastgpu.py'))]
    if script.exists():
        ways.append((str(script),))
    results = []
    for n, command in enumerate(ways):
        queue = Queue(tmp_path / str(n))
        for k in range(4):
            queue.add(f'{k}.sh', f'echo {k}; exit {k}')
        status, _ = queue.poll('--workers', '2', command=command, cwd=alone)
        results.append((status, queue.all(), [queue.out(f'{k}.sh.stdout') for k in range(4)]))
    assert results[0] == (1, {'0.sh': 'complete', '1.sh': 'fail', '2.sh': 'fail', '3.sh': 'fail'},
                          ['0\n', '1\n', '2\n', '3\n'])
    assert results == [results[0]] * len(ways)


def test_version():
    text = subprocess.run([*COMMAND, '--version'], capture_output=True, text=True, check=True).stdout
    assert text == f'fastgpu {fastgpu.__version__}\n'


def test_help_fits_on_a_screen_and_shows_first_how_to_submit_and_see():
    text = run_command('--help', env={**os.environ, 'COLUMNS': '80'}).stdout
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    order = ['--path PATH', '--add', '--run', '--status', '--exit', '--max-used', 'cancel: ', 'exit status: ']
    assert sorted(order, key=lambda word: re.search(f'(?m)^ *{word}', text).start()) == order


def test_the_path_is_the_current_folder_by_default(queue):
    queue.add('a.sh')
    subprocess.run([*COMMAND, '--workers', '1'], cwd=queue.path, check=True)
    assert queue.all() == {'a.sh': 'complete'}


def test_exit_0_goes_on_polling(queue):
    poller = queue.start('--exit', '0', '--workers', '1')
    for name in 'ab':
        queue.add(name)
        until(lambda name=name: name in queue.names('complete'))
    poller.send_signal(signal.SIGTERM)
    assert poller.wait(30) == 143


@pytest.mark.parametrize(('args', 'words'), [
    (['--exit', '2'], 'argument --exit: invalid choice: 2'),
    (['--workers', '0'], "argument --workers: not a whole number from 1 to 9999: '0'"),
    (['--workers', 'x'], "argument --workers: not a whole number from 1 to 9999: 'x'"),
    (['--workers', '99999999999'], 'not a whole number from 1 to 9999'),
    (['--max-used', 'nan'], "argument --max-used: not a number of MiB: 'nan'"),
    (['--max-used', '-1'], 'argument --max-used: '),
    (['--nonsense'], "error: '--nonsense' is no option\n"),
    (['--wor', '2'], "'--wor' is no option: did you mean --workers?"),
    (['--worker=2'], "'--worker=2' is no option: did you mean --workers?"),
    (['.'], "'.' is no option: did you mean --path .?"),
    (['--path=~/q'], 'fastgpu_poll: ~/q: there is no such folder; a shell takes ~ for your home only after a space'),
    (['train.py'], "'train.py' is no option: a script goes into to_run (mv or cp), a command behind --add or --run"),
    (['--gpus', '2'], '--gpus does nothing here: it is for --add and --run\n'),
    (['--wrapper', 'nice', '--add'], '--wrapper does nothing with --add: it is for the fastgpu_poll that runs the '),
    (['--per-gpu', '2', '--add'], '--per-gpu does nothing with --add: it is for --run and --status and the '),
    *[([*options, '--run', 'true'], f'{options[0]} does nothing with --run: ') for options in
      (['--path', '/'], ['--exit', '0'], ['--workers', '2'], ['--wrapper', 'nice'], ['--json'])],
    (['--run'], '--run takes a command; options stand before it\n'),
    (['--add', 'train && eval'], "--add takes words: train && eval   or a line of shell: sh -c 'train && eval'"),
    (['--run', '--gpus', '2', 'true'], '--run takes a command; options stand before it\n'),
    (['--gpus', '0', '--run', 'true'], "argument --gpus: not a whole number from 1 to 9999: '0'"),
    (['--status', '--exit', '0'], '--exit does nothing with --status: '),
    (['--path', ''], 'an empty --path: there is no such folder'),
    (['--add', '--status'], '--add takes a command; options stand before it'),
    (['--status', '--add'], '--add and --status are two things: do one after the other'),
    (['--json'], '--json does nothing here: it is for --status'),
])
def test_wrong_options_are_named(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'execvpe', None)  # should it take them all the same
    code, said = answer(*args)
    assert code == 2
    assert words in said
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_is_status_2_also_where_it_cannot_be_said():
    command = shlex.join([*COMMAND, '--nonsense'])
    without = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    assert subprocess.run(['bash', '-c', f'{command} 2>/dev/full'], env=without).returncode == 2


@pytest.mark.parametrize(('wrapper', 'words'), [
    ('nowhere 4h', "there is no command 'nowhere'"), ('', 'there is no command'), ('"sh', 'no closing quotation')])
def test_a_wrapper_that_does_not_exist_is_told_at_the_start(queue, wrapper, words):
    queue.add('a.sh')
    status, log = queue.poll('--workers', '1', '--wrapper', wrapper)
    assert status == 2
    assert words in log
    assert queue.all() == {'a.sh': 'to_run'}


@pytest.mark.parametrize('options', ['--help', '--version', '--status', '--status --json', '--add', ''])
def test_no_reader_and_no_room_for_what_it_prints_is_no_status_but_those_of_the_readme(queue, options):
    command = shlex.join([*COMMAND, '--path', str(queue.path), *options.split()])
    command = f'echo true | {command}' if options == '--add' else f'{command} --workers 1'
    without = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    ends = {'| true': 0, '| head -1': 0, '>&-': 0, '2>&-': 0, '>&- 2>&-': 0, '2>&1 | true': 0, '2>/dev/full': 0,
            '>/dev/full': int(bool(options))}
    for end, status in ends.items():
        run = subprocess.run(['bash', '-c', f'set -o pipefail; {command} {end}'], capture_output=True, text=True,
                             env=without)
        said = re.sub('(?m)^[0-9-]+T.*\\n', '', run.stderr)
        assert run.returncode == status, (end, run.stderr)
        if 'usage: ' not in said and said != 'fastgpu 0.1.0\n':  # argparse prints that to the one that is open
            assert said == 'fastgpu_poll: standard output: No space left on device\n' * status, end


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / 'json.py').write_text('raise KeyboardInterrupt')
    run = subprocess.run([sys.executable, '-c', 'import sys, runpy; sys.path.insert(0, sys.argv[1]); '
                          f'runpy.run_path({str(MODULE)!r}, run_name="__main__")', tmp_path], capture_output=True)
    assert (run.returncode, run.stderr) == (130, b'')


def refused(path, command=None):
    """Return the one line with which the command refuses to use `path`."""
    args = '--path', str(path), '--workers', '1'
    if command:
        run = subprocess.run([*command, *args], capture_output=True, text=True, cwd=MODULE.parent)
        code, said = run.returncode, run.stderr
    else:
        code, said = answer(*args)
    assert code == 2
    assert re.fullmatch('fastgpu_poll: .*\n', said)
    return said


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    assert f'{tmp_path}/file: is not a folder' in refused(tmp_path / 'file')
    (tmp_path / 'q').mkdir()
    (tmp_path / 'q' / 'to_run').touch()
    assert f'{tmp_path}/q/to_run: is not a folder' in refused(tmp_path / 'q')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can try it as somebody else')
def test_a_path_that_cannot_be_written_is_refused():
    with tempfile.TemporaryDirectory() as path:  # tmp_path is hidden from others
        os.chmod(path, 0o755)
        as_nobody = [sys.executable, '-c', AS_NOBODY]
        assert f'fastgpu_poll: {path}/to_run: Permission denied' in refused(path, as_nobody)
        fastgpu.setup_dirs(path)
        nobody = fastgpu.user_name(65534)
        said = f'{path}/to_run belongs to root: run it as root, take a --path of your own, or make it yours: sudo chown'
        assert refused(path, as_nobody) == f'fastgpu_poll: {said} -R {nobody} {shlex.quote(path)}\n'


def test_a_path_that_was_mistyped_makes_no_queue(queue, tmp_path):
    assert refused(tmp_path / 'typo') == f'fastgpu_poll: {tmp_path}/typo: there is no such folder; mkdir makes it\n'
    assert not (tmp_path / 'typo').exists()
    assert refused(queue.path / 'to_run') == (f'fastgpu_poll: {queue.path}/to_run is a folder of a queue: '
                                              f'give its --path, {queue.q}\n')
    assert queue.names('to_run') == []
    (tmp_path / 'new').mkdir()
    run = subprocess.run([*COMMAND, '--workers', '1', '--path', tmp_path / 'new'], capture_output=True)
    assert run.returncode == 0
    assert f'nothing to run in {tmp_path}/new/to_run, which was made just now' in run.stderr.decode()
    assert 'just now' not in queue.poll()[1]


def test_a_current_folder_that_is_gone_is_told(tmp_path):
    command = shlex.join([*COMMAND, '--workers', '1'])
    run = subprocess.run(f'mkdir gone; cd gone; rmdir ../gone; exec {command}', shell=True, capture_output=True,
                         text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (2, 'fastgpu_poll: the current folder was removed: cd to one that exists\n')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can give a folder to somebody else')
def test_root_runs_nothing_of_a_queue_that_belongs_to_somebody_else(queue):
    queue.add('a.sh')
    for folder in '', *FOLDERS, 'out':
        os.chown(queue.path / folder, 65534, 65534)
        message = refused(queue.path)
        assert f' belongs to {fastgpu.user_name(65534)}: run it as ' in message, folder
        subprocess.run(message.partition('make it yours: sudo ')[2], shell=True, check=True)
    assert queue.all() == {'a.sh': 'to_run'}
    assert queue.poll()[0] == 0


@pytest.mark.parametrize('mode', [0o777, 0o757, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused_with_the_chmod_that_mends_it(queue, mode):
    queue.add('a.sh')
    for folder in *FOLDERS, 'out':
        (queue.path / folder).chmod(mode)
        message = refused(queue.path)
        assert message == ('fastgpu_poll: others could have their code run as you; mend it with: '
                           f'chmod go-w {shlex.quote(f"{queue.path}/{folder}")}\n')
        subprocess.run(message.partition('mend it with: ')[2], shell=True, check=True)
    assert queue.all() == {'a.sh': 'to_run'}
    assert queue.poll()[0] == 0


@pytest.mark.skipif(os.getuid() != 0, reason='only root can try it as somebody else')
def test_a_folder_that_only_the_private_group_of_its_owner_can_write_to_is_safe(tmp_path):
    group = subprocess.run(['getent', 'group', 'mail', 'games'], capture_output=True, text=True).stdout
    games = pwd.getpwnam('games')  # Debian has a group of that name without members
    if f'games:x:{games.pw_gid}:\n' not in group or games.pw_gid == 8:
        pytest.skip('has no private group at hand')
    for gid, safe in (games.pw_gid, True), (8, False):
        with tempfile.TemporaryDirectory() as path:
            fastgpu.setup_dirs(path)
            for folder in Path(path), *Path(path).iterdir():
                os.chown(folder, games.pw_uid, gid)
                folder.chmod(0o775)
            assert fastgpu.others_can_write(os.stat(path)) == (not safe)


def test_a_queue_in_a_sticky_folder_is_not_refused(queue):
    queue.path.chmod(0o1777)
    assert queue.poll()[0] == 0
    queue.path.chmod(0o777)
    assert f'chmod go-w {queue.q}\n' in refused(queue.path)


def test_who_could_swap_the_queue_is_warned_of(queue, tmp_path):
    tmp_path.chmod(0o777)
    assert queue.poll()[1].count(f'warning: others can write to {tmp_path}, and put another queue in the place of') == 1
    tmp_path.chmod(0o1777)
    assert 'warning' not in queue.poll()[1]


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOLCK])
def test_a_kernel_or_a_file_system_without_locks_is_told_at_the_start_in_one_line(queue, tmp_path, number):
    queue.add('a.sh')
    (tmp_path / 'sitecustomize.py').write_text(f"""
import fcntl, os
def fcntl_without(*args): raise OSError({number}, os.strerror({number}))
fcntl.fcntl = fcntl_without
""")
    status, log = queue.poll(env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert (status, queue.all()) == (2, {'a.sh': 'to_run'})
    assert log == (f'fastgpu_poll: {queue.path}: no locks there ({os.strerror(number)}): a queue needs Linux 3.15 or '
                   'newer, and a file system that has locks\n')


def test_to_run_and_running_must_be_two_folders(queue):
    (queue.path / 'running').rmdir()
    (queue.path / 'running').symlink_to('to_run')
    assert refused(queue.path) == (
        f'fastgpu_poll: {queue.path}/running is the same folder as {queue.path}/to_run: make it one of its own\n')


def test_the_folders_must_be_on_one_file_system(queue, tmp_path):
    shm = Path('/dev/shm')
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip('no second file system at hand')
    os.rmdir(queue.path / 'complete')
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        (queue.path / 'complete').symlink_to(folder)
        assert f'{queue.path}/complete is on another file system' in refused(queue.path)


def test_the_folder_of_the_locks_must_have_an_absolute_path(gpus, queue, monkeypatch):
    monkeypatch.setenv('FASTGPU_LOCK_DIR', 'locks')
    with pytest.raises(FastgpuError, match='absolute path'):
        ResourcePoolGPU(queue.path)


# --- Command: --add ---------------------------------------------------------------------------------------------------

def add(queue, cwd=None):
    return subprocess.Popen([*COMMAND, '--path', str(queue.path), '--add'], cwd=cwd,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def added(queue, text, cwd=None):
    process = add(queue, cwd)
    out, err = process.communicate(text)
    assert b'Traceback' not in err
    return process.returncode, out.decode().split(), err.decode()


def test_add_makes_a_script_of_each_line_which_runs_where_it_was_called(queue, tmp_path):
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    lines = [b'pwd; exit 3', b'', b'  # comment', b'  echo "a  b" \'$HOME\' | tr a-z A-Z  \r',
             b'echo \xff `echo %s`', b'echo "', b'#!not an interpreter', b'exec false']
    names = ['job-000001-pwd-exit-3.sh', 'job-000002-echo-a-b-HOME-tr-a-z-A-Z.sh', 'job-000003-echo-echo-s.sh',
             'job-000004-echo.sh', 'job-000005-exec-false.sh']
    assert added(queue, b'\n'.join(lines), folder) == (0, names, '')
    assert not [name for name in os.listdir(queue.path / 'to_run') if name.startswith('.')]
    assert queue.poll('--workers', '1')[0] == 1
    assert queue.out(f'{names[0]}.stdout') == f'{folder}\n'
    assert queue.out(f'{names[0]}.exitcode') == '3'
    assert queue.out(f'{names[1]}.stdout') == 'A  B $HOME\n'
    assert (queue.path / 'out' / f'{names[2]}.stdout').read_bytes() == b'\xff %s\n'
    assert queue.out(f'{names[3]}.exitcode') == '2'
    assert queue.out(f'{names[4]}.exitcode') == '1'


def test_a_line_that_ends_in_a_backslash_goes_on_in_the_next(queue):
    assert len(added(queue, b'echo one \\\n two\necho three\\\\\necho four')[1]) == 3
    assert queue.poll('--workers', '1')[0] == 0
    assert [queue.out(f'{name}.stdout') for name in queue.names('complete')] == ['one two\n', 'three\\\n', 'four\n']


@pytest.mark.parametrize('words', [['printf', '%s|', "it's", '$HOME', '', 'a\nb', '*', '-n', '--x'], ['true'],
                                   ['sh', '-c', 'exit 3']])
def test_the_words_behind_add_are_one_script_which_does_what_they_do_in_a_shell(queue, words):
    name = run_command('--path', str(queue.path), '--add', *words, check=True).stdout.strip()
    queue.poll('--workers', '1')
    direct = subprocess.run(words, capture_output=True, text=True)
    assert (queue.out(f'{name}.stdout'), queue.out(f'{name}.exitcode')) == (direct.stdout, str(direct.returncode))


def test_what_is_added_runs_in_the_environment_in_which_it_was_added(queue, tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'my env'], check=True)
    activated = f'. {shlex.quote(str(tmp_path / "my env/bin/activate"))}; "$@"'
    subprocess.run(['sh', '-c', activated, 'sh', *COMMAND, '--path', str(queue.path), '--add',
                    'python', '-c', 'import os, sys; print(sys.prefix, os.environ.get("SECRET"))'],
                   check=True, env={**os.environ, 'LD_LIBRARY_PATH': '/a b:', 'SECRET': 'x'}, stdout=subprocess.DEVNULL)
    assert "LD_LIBRARY_PATH='/a b:'" in next((queue.path / 'to_run').iterdir()).read_text()
    assert queue.poll('--workers', '1', env={**os.environ, 'PATH': '/usr/bin:/bin', 'VIRTUAL_ENV': 'x'})[0] == 0
    assert queue.out(f'{queue.names("complete")[0]}.stdout') == f'{tmp_path}/my env None\n'


def test_gpus_with_add_are_a_line_of_the_script(queue, gpus):
    run_command('--path', str(queue.path), '--gpus', '2', '--add', 'sh', '-c', SEES, check=True)
    assert queue.poll('--exit', '1')[0] == 0
    assert queue.out(f'{queue.names("complete")[0]}.stdout').split()[0] == '0,1'


@pytest.mark.parametrize(('command', 'name'), [
    ("python3 /home/ann/train.py --lr 0.1 --data=/big/x.csv", 'train.py-lr-0.1-data-x.csv'),
    ("/usr/bin/python3.11 -m 'a b' \"c\"", 'm-a-b-c'), ('(', ''), ("'\n$(rm *)'", 'rm'), ('é' * 99, ''),
    ('x' * 99, 'x' * 40), ('a' * 39 + ' b', 'a' * 39), ('.', ''), ('../run.sh', 'run.sh')])
def test_a_name_tells_the_command_and_is_safe(command, name):
    assert fastgpu.title(command) == name


def test_a_number_is_never_given_twice(queue):
    assert added(queue, b'true\ntrue')[1] == ['job-000001-true.sh', 'job-000002-true.sh']
    for file in (queue.path / 'to_run').iterdir():
        file.rename(queue.path / f'renamed-{file.name}')
    assert added(queue, b'true')[1] == ['job-000003-true.sh']
    queue.add('job-000012.sh')
    assert added(queue, b'true')[1] == ['job-000013-true.sh']
    (queue.path / '.job.lock').write_bytes(b'\xffnonsense')
    assert added(queue, b'true')[1] == ['job-000014-true.sh']


def test_two_that_add_at_once_keep_their_lines_together(queue):
    adding = [add(queue) for _ in range(4)]
    for process in adding:
        process.stdin.write(b'true\n' * 300)
    for process in adding:
        process.stdin.close()
    names = [process.stdout.read().decode().split() for process in adding]
    assert [process.wait(30) for process in adding] == [0] * 4
    assert sorted(itertools.chain(*names)) == [f'job-{n:06}-true.sh' for n in range(1, 1201)]
    assert all(int(some[-1][4:10]) == int(some[0][4:10]) + 299 for some in names)


def test_add_refuses_what_cannot_be_a_script_before_it_adds_any(queue):
    code, out, err = added(queue, b'true\nec\0ho\n')
    assert (code, out, err) == (2, [], 'fastgpu_poll: no script can hold a NUL byte: ec\\x00ho\n')
    assert queue.all() == {}
    assert added(queue, b'\n# only a comment\n') == (
        0, [], 'fastgpu_poll: nothing to add: no commands on standard input\n')


def test_add_on_a_full_disk_says_how_far_it_came_and_leaves_no_half_script(small_disk):
    fill(small_disk.path)
    code, out, err = added(small_disk, b'true\nfalse\n')
    assert (code, out) == (2, [])
    assert re.match('fastgpu_poll: of 2 commands none could be added: .*No space left on device\n$', err)
    assert os.listdir(small_disk.path / 'to_run') == []


# --- Command: --run, one command now ----------------------------------------------------------------------------------

def running(*args, **kwargs):
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.PIPE, text=True, **kwargs)


def test_run_becomes_the_command_with_a_gpu_and_the_status_and_streams_are_its_own(gpus, tmp_path):
    run = run_command('--run', 'sh', '-c', f'{SEES}; cat; pwd; grep SigIgn: /proc/self/status; echo oops >&2; exit 7',
                      input='in\n', cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL))
    *lines, ignored = run.stdout.splitlines()
    assert lines == ['0 0 PCI_BUS_ID', 'in', str(tmp_path)]
    assert not int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    assert (run.stderr, run.returncode) == ('oops\n', 7)
    assert not (tmp_path / 'to_run').exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_a_gpu_is_taken_as_long_as_the_command_of_run_lives(gpus, queue, tmp_path):
    gpus.have(1)
    queue.change(LOOK_AROUND=0.2)
    first = running('--run', 'sh', '-c', 'sleep 1000 & echo $$ $!; wait', cwd=tmp_path)
    pid, child = map(int, first.stdout.readline().split())
    assert pid == first.pid
    second = running('--run', 'echo', 'mine')
    queue.add('a.sh')
    poller = queue.start('--exit', '1', '--per-gpu', '2')
    busy = f'gpu 0 busy: runs sh of yours (pid {pid}, {tmp_path})\n'
    assert second.stderr.readline().endswith(f' {busy}')
    until(lambda: busy in poller.log())
    kill(first)
    assert busy[6:].strip() in status(queue)[1]  # its child still has the lock
    os.kill(child, signal.SIGKILL)
    assert second.communicate(timeout=30)[0] == 'mine\n'
    assert poller.wait(30) == 0


def test_run_waits_for_several_gpus(gpus):
    gpus.have(3)
    gpus.change(0, pids=[4121])
    two = run_command('--gpus', '2', '--run', 'sh', '-c', SEES)
    assert (two.stdout, two.returncode) == ('1,2 1,2 PCI_BUS_ID\n', 0)
    four = run_command('--gpus', '4', '--run', 'true')
    assert (four.stderr, four.returncode) == ('fastgpu_poll: 4 gpus are needed, and there are only 3\n', 2)


def test_ctrl_c_while_run_waits_is_130_and_leaves_nothing(gpus):
    gpus.have(1)
    gpus.change(0, pids=[4121])
    waits = running('--run', 'true')
    assert 'gpu 0 busy: 500 MiB used by pid 4121' in waits.stderr.readline()
    waits.send_signal(signal.SIGINT)
    assert waits.wait(30) == 130
    assert waits.stderr.read() == ''


@pytest.mark.parametrize(('name', 'code', 'words'), [
    ('no-such-command', 127, "there is no command 'no-such-command'"),
    ('{}/x', 126, '{}/x cannot be executed: chmod +x')])
def test_run_of_what_is_no_command_or_not_executable_is_told_before_it_waits(gpus, tmp_path, name, code, words):
    gpus.change(0, pids=[4121])
    gpus.change(1, pids=[4121])
    (tmp_path / 'x').touch()
    run = run_command('--run', name.format(tmp_path))
    assert (run.returncode, run.stderr) == (code, f'fastgpu_poll: {words.format(tmp_path)}\n')


def test_run_of_what_cannot_be_executed_is_126(gpus, tmp_path):
    broken = tmp_path / 'broken'
    broken.write_text('#!/no/such/interpreter\n')
    broken.chmod(0o755)
    run = run_command('--run', str(broken))
    assert run.returncode == 126
    assert re.fullmatch('fastgpu_poll: .*\n', run.stderr)


def test_run_has_the_terminal_and_its_ctrl_c(gpus):
    ours, theirs = pty.openpty()
    command = 'trap "echo interrupted; exit 5" INT; [ -t 0 ] && [ -t 1 ] && echo ready; while :; do sleep 0.05; done'
    process = subprocess.Popen([*COMMAND, '--run', 'sh', '-c', command], stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    text = b''
    while b'ready' not in text:
        text += os.read(ours, 4096)
    os.write(ours, b'\x03')
    assert process.wait(30) == 5
    os.close(ours)


def test_without_a_driver_run_says_so(gpus):
    gpus.save(init=9)
    run = run_command('--run', 'true')
    assert run.returncode == 2
    assert 'no NVIDIA driver found' in run.stderr


# --- All eight rules: random fire -------------------------------------------------------------------------------------

class Fire:
    """Pollers on one queue with fake GPUs, killed, stopped and started at random, on hosts of several names, some with
    a log that nobody reads; and a person who adds, edits and moves scripts."""

    # So many of its scripts fail that all GPUs would rest.
    COMMAND = poller_with(AT_ONCE=0)

    # What they write is beside the queue, which is moved.
    BODY = """exec 9>{path}/held-$FASTGPU_ID
flock -n 9 || echo {token} >> {path}/clash
trap 'exit 9' TERM
echo {token}; sleep {seconds} & wait
echo {token} >> {path}/ended; echo end; exit {status}"""

    def __init__(self, queue, seed):
        self.queue, self.random = queue, random.Random(seed)
        self.aside = Path(f'{queue.path}-aside')
        self.aside.mkdir()
        self.tokens, self.touched, self.kills = 0, set(), 0
        self.statuses = {}
        self.live, self.unread = [], []
        self.hosts = not os.getuid() and not subprocess.run(['unshare', '--uts', '--mount', 'true'], check=False,
                                                            capture_output=True).returncode

    def start_poller(self):
        options = {}
        if self.random.random() < 0.2:
            unread, options['stderr'] = os.pipe()
            fcntl.fcntl(unread, F_SETPIPE_SZ, 4096)
            self.unread.append(unread)
        command = self.COMMAND
        if self.hosts and self.random.random() < 0.3:
            command = on_host(self.random.choice(['one', 'two']), command=command)
        self.live.append(self.queue.start('--exit', '0', command=command, **options))
        if 'stderr' in options:
            os.close(options['stderr'])

    def freeze(self):
        """Stop a poller, or a script, for a moment."""
        pids = [poller.pid for poller in self.live]
        for name in self.queue.names('running')[:1]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                pid = self.queue.record(name)['pid']
                if f'{name}.exitcode' in Path(f'/proc/{pid}/cmdline').read_text():
                    pids.append(pid)
        pid = self.random.choice(pids)
        for signum in signal.SIGSTOP, signal.SIGCONT:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
            time.sleep(self.random.random() / 10)

    def edit(self):
        """Leave what an editor leaves while one edits, which must never run."""
        number = self.random.randrange(30)
        for name in f'#s{number}.sh#', f's{number}.sh~':
            file = self.queue.path / 'to_run' / name
            file.write_text(f'#!/bin/sh\necho {name} >> {shlex.quote(str(self.aside / "clash"))}\n')
            file.chmod(0o755)
            os.utime(file, (1, 1))

    def move_the_queue(self):
        """Move the whole queue away, and back after a moment, in which a poller that just starts may make it anew."""
        away = self.queue.path.rename(f'{self.queue.path}-away')
        time.sleep(self.random.random() / 20)
        while True:
            try:
                away.rename(self.queue.path)
                break
            except OSError:  # what ended in that moment may have written its status there
                self.touched |= {re.search('t[0-9]{5}', file.read_text())[0] for file in away.glob('running/*')}
                shutil.rmtree(self.queue.path, ignore_errors=True)

    def stop_poller(self):
        poller = self.live.pop(self.random.randrange(len(self.live)))
        for signum in self.random.choice([[signal.SIGKILL], [signal.SIGKILL], [signal.SIGTERM], [signal.SIGINT],
                                          [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGKILL]]):
            poller.send_signal(signum)
            time.sleep(self.random.random() / 20)
        self.kills += 1

    def add(self):
        self.tokens += 1
        token = f't{self.tokens:05}'
        name = f's{self.random.randrange(30)}.sh'
        self.statuses[token] = self.random.choice([0, 0, 1, 77])
        body = self.BODY.format(path=shlex.quote(str(self.aside)), token=token, status=self.statuses[token],
                                seconds=round(self.random.random() / 5, 3))
        draft = self.queue.path / token
        draft.write_text(f'#!/bin/sh\n{body}\n')
        draft.chmod(0o755)
        try:
            fastgpu.rename_new(draft, self.queue.path / 'to_run' / name)
        except FileExistsError:
            os.rename(draft, self.queue.path / 'to_run' / f'{token}.sh')

    def move_by_hand(self):
        source = self.random.choice(['running', 'to_run', 'fail', 'complete'])
        for name in [name for name in self.queue.names(source) if name[0] in 'st' and name[-1] != '~'][:1]:
            file = self.queue.path / source / name
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self.touched.add(re.search('t[0-9]{5}', file.read_text())[0])
                fastgpu.rename_new(file, self.queue.path / self.random.choice(['to_run', 'trash']) / name)

    def cut_off(self):
        for name in self.queue.names('running')[:1]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                token = re.search('t[0-9]{5}', (self.queue.path / 'running' / name).read_text())[0]
                pid = self.queue.record(name)['pid']
                if f'{name}.exitcode' in Path(f'/proc/{pid}/cmdline').read_text():
                    self.touched.add(token)
                    os.killpg(pid, signal.SIGKILL)

    def rage(self, seconds):
        (self.queue.path / 'trash').mkdir()
        deadline = time.monotonic() + seconds
        actions = ([self.add] * 12 + [self.stop_poller] * 3
                   + [self.move_by_hand, self.cut_off, self.freeze, self.edit, self.move_the_queue])
        while time.monotonic() < deadline:
            while len(self.live) < 3:
                self.start_poller()
            self.random.choice(actions)()
            time.sleep(self.random.random() / 25)
        for poller in self.queue.pollers:  # all: one that was interrupted while Python itself started may go on
            kill(poller)
        for unread in self.unread:
            os.close(unread)

    def was_away(self, name):
        """Return whether the queue was when a shell looked for this script."""
        return re.search('No such file|not found', self.queue.out(f'{name}.stderr'))

    def check(self):
        queue = self.queue
        last = queue.start('--exit', '1', command=self.COMMAND)
        last.wait(60)
        for poller in queue.pollers:  # but for an INT while Python itself still starts
            assert 'Traceback' not in poller.log() or re.search('KeyboardInterrupt|Fatal Python error', poller.log())
        assert not (self.aside / 'clash').exists()
        ended = Counter((self.aside / 'ended').read_text().split())
        where = {}
        for name, folder in queue.all().items():
            if name.startswith('#') or name.endswith('~'):
                continue
            token = re.search('t[0-9]{5}', (queue.path / folder / name).read_text())[0]
            where.setdefault(token, []).append((folder, name))
        # TERM can meet a script that is about to end badly by itself: it is requeued, as what did not end well.
        # A record is empty where its poller died before it wrote it: that name is not used again.
        records = {name[:-5]: json.loads(queue.out(name) or '{}') for name in queue.names('out') if '.json' in name}
        stopped = Counter(queue.out(f'{name}.stdout')[:6] for name, record in records.items() if record.get('stopped'))
        for token, status in self.statuses.items():
            if token in self.touched or self.was_away(where[token][0][1]):
                continue  # it is as if the person had: the queue was away when somebody looked for the script
            assert 1 <= ended[token] <= 1 + stopped[token], token
            [(folder, name)] = where[token]
            assert folder == ('fail' if status else 'complete')
            assert queue.out(f'{name}.exitcode') == str(status)
            assert queue.out(f'{name}.stdout') == f'{token}\nend\n'
            assert queue.record(name)['exitcode'] == status
        names = set(queue.names('out'))
        for name in names:
            if name.endswith('.json'):  # what was taken out of running while no poller looked has no end in its record
                token = (queue.has_out(f'{name[:-5]}.stdout') or '')[:6]
                assert 'finished' in records[name[:-5]] or token in {*self.touched, ''}, name
            else:
                assert f'{os.path.splitext(name)[0]}.json' in names, name
        return f'{self.tokens} scripts, {self.kills} pollers stopped, {len(self.touched)} scripts touched by hand'


def test_random_fire(gpus, queue):
    gpus.have(3)
    fire = Fire(queue, seed=int(os.environ.get('SEED', time.time())))
    fire.rage(3)
    fire.check()


@pytest.mark.soak
def test_soak(gpus, tmp_path, capsys):
    gpus.have(4)
    deadline = time.monotonic() + float(os.environ.get('SECONDS', 600))
    for seed in itertools.count():
        if time.monotonic() > deadline:
            break
        fire = Fire(Queue(tmp_path / f'q{seed}'), seed)
        fire.rage(min(60, max(5, deadline - time.monotonic())))
        with capsys.disabled():
            print(f'\nseed {seed}: {fire.check()}')


# --- Bench: make bench, each figure beside a peer in the same run -----------------------------------------------------

STAMPED = '#!/bin/sh\nexec >{out}/$$; date +%s.%N; sleep 0.05; date +%s.%N\n'


ORIGINAL = """
import os, subprocess, sys, threading, time
busy, names = [threading.Lock(), threading.Lock()], sorted(os.listdir(sys.argv[1]))
def run(slot, name):
    subprocess.run([os.path.join(sys.argv[1], name)])
    slot.release()
while names:
    for slot in busy:
        if names and slot.acquire(blocking=False):
            threading.Thread(target=run, args=(slot, names.pop(0))).start()
    time.sleep(0.1)
"""


PEERS = {  # each runs the scripts of the folder {0} on two slots, and waits for them
    'xargs': 'ls -d {0}/* | xargs -P2 -n1 env',
    'parallel': 'ls -d {0}/* | parallel -j2',
    'tsp': 'export TS_SOCKET={0}.socket TMPDIR=/tmp; tsp -S 2; for s in {0}/*; do tsp -nf env $s & done; wait; tsp -K',
    "the original's loop": f'{sys.executable} -c "$ORIGINAL" {{0}}',
}


class Bench:
    """Folders of scripts, ways to run them, and a table of what that took."""

    def __init__(self, path):
        self.path = path
        self.folders = 0

    def scripts(self, number, text):
        """Return a new queue with so many scripts, old enough to start at once."""
        self.folders += 1
        queue = Queue(self.path / f'{self.folders}')
        (queue.path / 'stamps').mkdir()
        for n in range(number):
            script = queue.path / 'to_run' / f'{n:06}.sh'
            script.write_text(text.format(out=queue.path / 'stamps'))
            script.chmod(0o755)
        time.sleep(0.2)
        return queue

    def time(self, who, queue):
        """Run the queue to its end with a peer, or with fastgpu and the options `who`; return the seconds."""
        ours = f'{shlex.join(COMMAND)} {who} --path {queue.q}'
        command = PEERS.get(who, ours).format(queue.path / 'to_run')
        began = time.monotonic()
        subprocess.run(command, shell=True, stderr=subprocess.DEVNULL, env={**os.environ, 'ORIGINAL': ORIGINAL})
        return time.monotonic() - began

    def idle(self, who):
        """Return the milliseconds in which a slot was idle for each script of 50 ms, by what the scripts wrote."""
        queue = self.scripts(60, STAMPED)
        self.time(who, queue)
        times = [tuple(map(float, file.read_text().split())) for file in (queue.path / 'stamps').iterdir()]
        assert len(times) == 60
        span = max(end for _, end in times) - min(start for start, _ in times)
        return (2 * span - sum(end - start for start, end in times)) / 60 * 1000

    def small(self, who):
        """Return the milliseconds for each of 1,000 scripts that end at once."""
        return self.time(who, self.scripts(1000, '#!/bin/sh\n')) / 1000 * 1000

    def row(self, what, ours, limit, unit, peers=()):
        """Add a line to the table: our figure, its limit, and those of the peers."""
        print(f'{what:44}{ours:9.2f} {limit:9.2f} {unit:5}', *(f'{who} {n:.2f} ' for who, n in dict(peers).items()))

    def compare(self, what, measure, who, limit, unit, leave_out=''):
        """Measure fastgpu and the peers that are here five times by turns; add a line with the medians."""
        found = [peer for peer in PEERS if peer != leave_out and (shutil.which(peer) or 'original' in peer)]
        figures = {name: [] for name in (who, *found)}
        for _, name in itertools.product(range(5), figures):
            figures[name].append(measure(name))
        medians = {name: statistics.median(values) for name, values in figures.items()}
        ours = medians.pop(who)
        self.row(what, ours, limit * medians['xargs'], unit, medians)


def stretch(queue, number, *args):
    """Start a poller, let it file so many scripts, and interrupt it; return the milliseconds for each script, the
    seconds until the first one started, and the MiB that the poller had."""
    began, done = time.time(), len(queue.names('complete'))
    poller = queue.start(*args)
    until(lambda: len(queue.names('complete')) >= done + number)
    memory = used_by(poller.pid)[1]
    poller.send_signal(signal.SIGINT)
    poller.wait()
    records = [record for record in map(json.loads, map(Path.read_text, (queue.path / 'out').glob('*.json')))
               if record['started'] > began]
    first = min(record['started'] for record in records)
    return (max(record['finished'] for record in records) - first) / len(records) * 1000, first - began, memory


def share(poller, seconds=20):
    """Return the percentage of a core that a poller uses while nothing happens, and its MiB."""
    before = used_by(poller.pid)[0]
    time.sleep(seconds)
    after, memory = used_by(poller.pid)
    return (after - before) / seconds * 100, memory


def pick_up(queue, fresh):
    """Return the seconds after which an idle poller starts a script that is moved into to_run."""
    draft = queue.path / 'draft.sh'
    draft.write_text('#!/bin/sh\ndate +%s.%N\n')
    draft.chmod(0o755)
    if not fresh:
        os.utime(draft, (1, 1))
    name = f'!{time.time()}.sh'
    moved = time.time()
    os.rename(draft, queue.path / 'to_run' / name)
    return float(until(lambda: queue.has_out(f'{name}.stdout'))) - moved


def turns(path, number, seconds, mixed=False, streams=(), options=((),)):
    """Let so many queues with one poller each share the GPUs for a while; return what share of the GPU time each had,
    as a multiple of an even one, and for how many seconds a GPU was idle from one script to the next.

    With `options`, each poller has its own in turn; `streams` are lines for the first script of each further queue.
    """
    queues = [Queue(path / f'turn-{time.monotonic_ns()}-{n}') for n in range(number)]
    for queue in queues:
        rng = random.Random(1)  # the same mixture for each
        for n in range(int(seconds / 0.2) + 9):
            queue.add(f'{n:04}.sh', f'sleep {0.1 + 1.9 * rng.random() if mixed else 0.2:.2f}')
    began = time.time()
    pollers = [queue.start('--exit', '0', *some) for queue, some in zip(queues, itertools.cycle(options))]
    time.sleep(seconds)
    for poller in pollers:
        poller.send_signal(signal.SIGTERM)
    for poller in pollers:
        poller.wait()
    runs = [[record for name in queue.names('complete') for record in [queue.record(name)]] for queue in queues]
    times = [sum(record['finished'] - record['started'] for record in records) for records in runs]
    by_gpu = {}
    for record in sorted(itertools.chain(*runs), key=lambda record: record['started']):
        by_gpu.setdefault(record['ids'][0], []).append(record)
    gaps = [later['started'] - record['finished'] for records in by_gpu.values()
            for record, later in zip(records, records[1:])]
    assert began < min(record['started'] for records in runs for record in records)
    return [used / (sum(times) / number) for used in times], statistics.mean(gaps)


def wait_for_several(path, need):
    """Return the seconds for which a script waits for so many of four GPUs beside four streams of small ones."""
    folder = path / f'several-{time.monotonic_ns()}'
    folder.mkdir()
    streams = [Queue(folder / f'{n}') for n in range(4)]
    rng = random.Random(need)
    for queue, n in itertools.product(streams, range(60)):
        queue.add(f'{n}', f'sleep {0.1 + 1.9 * rng.random():.2f}')
    pollers = [queue.start('--exit', '0') for queue in streams]
    until(lambda: all(queue.names('complete') for queue in streams))
    wants = Queue(folder / 'wants')
    wants.add('big', f'#SBATCH --gpus={need}')
    began = time.time()
    assert wants.poll('--exit', '1')[0] == 0
    for poller in pollers:
        poller.send_signal(signal.SIGTERM)
        poller.wait()
    return wants.record('big')['started'] - began


def median(measure, *args):
    """Return the median of five measurements."""
    return statistics.median(measure(*args) for _ in range(5))


@pytest.mark.bench
def test_bench(gpus, tmp_path, capsys):
    bench = Bench(tmp_path)
    gpus.log.unlink()  # the driver would spend its time on that
    with capsys.disabled():
        print(f'\n{"":44}{"fastgpu":>9} {"limit":>9}')
        bench.compare('idle per script of 50 ms, two slots', bench.idle, '--workers 2', 1.6, 'ms')
        bench.compare('idle per script of 50 ms, two GPUs', bench.idle, '', 1.6, 'ms')
        bench.compare('script that ends at once, two slots', bench.small, '--workers 2', 2, 'ms',
                      leave_out="the original's loop")  # 50 s

        queue = bench.scripts(100_000, '#!/bin/sh\n')
        few, many = [], []
        for _ in range(5):
            few.append(stretch(bench.scripts(100, '#!/bin/sh\n'), 100, '--workers', '2'))
            many.append(stretch(queue, 100, '--workers', '2'))
        few, many = (list(map(statistics.median, zip(*rounds))) for rounds in (few, many))
        bench.row('cost per script, while 100,000 wait', many[0], 1.2 * few[0], 'ms', {'while 100 wait': few[0]})
        bench.row('   the first one starts after', many[1], 1, 's')
        bench.row('   memory', many[2], 64, 'MiB')
        poller = queue.start('--workers', '2')
        until(lambda: len(queue.names('complete')) > 600)
        bench.row('   one that sorts first starts after', median(pick_up, queue, False), 1, 's')
        poller.send_signal(signal.SIGINT)
        poller.wait()

        queue = bench.scripts(0, '')
        subprocess.run([*COMMAND, '--version'], stdout=subprocess.DEVNULL, check=True)  # compiles it
        poller = queue.start('--exit', '0', '--workers', '2', command=COMMAND)
        bench.row('a script moved to an idle poller starts after', median(pick_up, queue, False), 0.15, 's')
        bench.row('   one that was just written', median(pick_up, queue, True), 0.25, 's')
        processor, memory = share(poller)
        bench.row('idle poller', processor, 0.2, '%')
        bench.row('   memory', memory, 20, 'MiB')
        gpus.set({'uuid': 'GPU-1', 'pids': [4121]})
        poller = bench.scripts(1000, '#!/bin/sh\n').start('--exit', '0')
        until(lambda: 'busy' in poller.log())
        bench.row('1,000 scripts wait for a busy GPU', share(poller)[0], 1, '%')

        figures = {}
        for number in 2, 64:
            gpus.have(number)
            figures[number] = median(lambda: stretch(bench.scripts(640, '#!/bin/sh\n'), 640, '--exit', '1')[0])
        bench.row('cost per script, 64 GPUs', figures[64], 1.5 * figures[2], 'ms', {'2 GPUs': figures[2]})

        print(f'\n{"Turns, for 60 s":44}{"least":>9} {"most":>9} share, as a multiple of an even one; s to hand over')
        for number, have, mixed in itertools.product((2, 3, 5), (1, 4), (False, True)):
            gpus.have(have)
            shares, gap = turns(tmp_path, number, 60, mixed)
            what = f'{number} queues, {have} GPUs, {"0.1 to 2 s" if mixed else "0.2 s"}'
            print(f'{what:44}{min(shares):9.2f} {max(shares):9.2f} {gap:.3f}')
        for need in 2, 4:
            print(f'{need} GPUs beside four streams, 2 s at most: {median(wait_for_several, tmp_path, need):.1f} s')

        imports, help = [sys.executable, '-c', 'import argparse, subprocess, json'], [*COMMAND, '--help']
        figures = [[], []]
        for _, (times, command) in itertools.product(range(15), list(zip(figures, (imports, help)))):
            began = time.monotonic()
            subprocess.run(command, stdout=subprocess.DEVNULL)
            times.append((time.monotonic() - began) * 1000)
        figures = list(map(statistics.median, figures))
        bench.row('--help', figures[1], 1.5 * figures[0], 'ms', {'the imports alone': figures[0]})


@pytest.mark.bench
@pytest.mark.gpu
@pytest.mark.skipif(not real_gpu(), reason='NVML finds no GPU here')
def test_bench_on_a_real_gpu(tmp_path, capsys):
    queue = Bench(tmp_path).scripts(0, '')
    queue.open_gate()
    for number in range(10):
        queue.add(f'{number}.py', head=CUDA_JOB.format(python=sys.executable, gate=str(queue.path / 'gate')))
    pool = ResourcePoolGPU(queue.path)
    ident = pool.all_ids()[0]
    pool._places = {ident: pool._places[ident]}
    assert pool.poll_scripts() == 0
    records = sorted((queue.record(f'{number}.py') for number in range(10)), key=lambda record: record['started'])
    gaps = [(later['started'] - record['finished']) * 1000 for record, later in zip(records, records[1:])]
    times = []
    for _ in range(100):
        began = time.perf_counter()
        pool.is_available(ident)
        times.append((time.perf_counter() - began) * 1000)
    with capsys.disabled():
        print(f'\nfrom the end of a CUDA job to the start of the next: {statistics.median(gaps):.2f} ms; '
              f'to ask whether a GPU is free: {statistics.median(times):.2f} ms')
