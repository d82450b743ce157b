# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Starts, watches and stops the processes of the cloud.

Each process has its own session, a log file and a record in RUN/processes
with its pid and start time, so that nothing but what was started here is
ever stopped, whatever its name is.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
import typing

from cloud import layout

RECORDS = layout.RUN / 'processes'
#: A directory of files that tests let services fail by, one a service.
FAULTS = os.environ.get('PYCONTAINER_CLOUD_FAULTS')
#: A directory with one that has the package ``nova_pycontainer`` for each
#: host whose services tests want to be of another release.
RELEASES = os.environ.get('PYCONTAINER_CLOUD_RELEASES')
TAIL_LINES = 20


class CloudError(Exception):
    """Something of the cloud failed; the message is for the user."""


class ServiceError(CloudError):
    """A service failed: says which, and shows the end of its log."""

    def __init__(self, name: str, reason: str):
        path = log_path(name)
        super().__init__(f'{name}: {reason}\n{tail(path)}\n'
                         f'log: {path} (all logs: {layout.LOGS})')


def log_path(name: str) -> pathlib.Path:
    return layout.LOGS / f'{name}.log'


def tail(path: pathlib.Path, lines: int = TAIL_LINES) -> str:
    try:
        with open(path, 'rb') as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 16384))
            text = log.read().decode(errors='replace')
    except FileNotFoundError:
        return '    (no log)'
    return '\n'.join('    ' + line[:300]
                     for line in text.splitlines()[-lines:])


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5)), or None."""
    try:
        with open(f'/proc/{pid}/stat') as stat:
            return stat.read().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int | None:
    """Start time in clock ticks since boot; None if dead or a zombie."""
    fields = _stat(pid)
    if fields is None or fields[0] in 'ZX':
        return None
    return int(fields[19])


def session_members(session: int) -> list[int]:
    found = []
    for name in os.listdir('/proc'):
        if name.isdigit():
            fields = _stat(int(name))
            if fields and fields[0] not in 'ZX' and int(fields[3]) == session:
                found.append(int(name))
    return found


@dataclasses.dataclass
class Record:
    name: str
    pid: int
    started: int
    host: str
    argv: list[str]
    #: Unix time in seconds.
    at: float

    @classmethod
    def load(cls, name: str) -> typing.Optional['Record']:
        try:
            return cls(**json.loads((RECORDS / f'{name}.json').read_text()))
        except FileNotFoundError:
            return None

    def save(self) -> None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        path = RECORDS / f'{self.name}.json'
        new = path.with_suffix('.new')
        new.write_text(json.dumps(dataclasses.asdict(self)))
        new.rename(path)

    def forget(self) -> None:
        (RECORDS / f'{self.name}.json').unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started


def records() -> list[Record]:
    if not RECORDS.is_dir():
        return []
    found = [Record.load(path.stem) for path in sorted(RECORDS.glob('*.json'))]
    return [record for record in found if record]


def alive(name: str) -> bool:
    record = Record.load(name)
    return record is not None and record.alive


#: Our own children; kept, so that they are reaped.
_children: dict[int, subprocess.Popen] = {}


def spawn(name: str, argv: list[str], host: str,
          env: dict[str, str] | None = None) -> Record:
    """Starts a process (already wrapped to enter its host) and records it."""
    layout.LOGS.mkdir(parents=True, exist_ok=True)
    environ = {'PATH': f'{layout.VENV}/bin:/usr/local/sbin:/usr/local/bin:'
                       '/usr/sbin:/usr/bin:/sbin:/bin',
               'LANG': 'C.UTF-8', 'PYTHONUNBUFFERED': '1'}
    if FAULTS:
        # What is to go wrong in whom, see nova_pycontainer.runtime.faults.
        environ['PYCONTAINER_FAULTS'] = f'@{FAULTS}/{name}'
        environ['PYCONTAINER_FAULT_POINTS'] = f'{FAULTS}/{name}.points'
    if RELEASES and os.path.exists(f'{RELEASES}/{host}'):
        environ['PYTHONPATH'] = f'{RELEASES}/{host}'
    environ.update(env or {})
    with open(log_path(name), 'ab', buffering=0) as log:
        log.write(f'=== {time.strftime("%F %T")} {" ".join(argv)}\n'.encode())
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=environ, start_new_session=True, cwd='/')
    _children[child.pid] = child
    started = start_time(child.pid)
    if started is None:
        child.poll()
        raise ServiceError(name, 'ended at once')
    record = Record(name, child.pid, started, host, argv, time.time())
    record.save()
    return record


def wait_ready(name: str, ready: typing.Callable[[], bool],
               timeout: float, interval: float = 0.2) -> None:
    """Waits until ready() is true; fails early if the process ended."""
    deadline = time.monotonic() + timeout
    while True:
        if ready():
            return
        record = Record.load(name)
        if record is None or not record.alive:
            child = record and _children.get(record.pid)
            code = child.poll() if child else None
            raise ServiceError(name, f'ended while starting (exit {code})')
        if time.monotonic() > deadline:
            raise ServiceError(name, f'not ready after {timeout:.0f} s')
        time.sleep(interval)


def signal_quietly(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def stop(names: typing.Iterable[str], grace: float = 8.0,
         number: int = signal.SIGTERM) -> None:
    """Stops these processes together; after the grace kills the sessions."""
    waiting = []
    for name in names:
        record = Record.load(name)
        if record is None:
            continue
        if record.alive:
            signal_quietly(record.pid, number)
            waiting.append(record)
        else:
            record.forget()
    deadline = time.monotonic() + grace
    pending = list(waiting)
    while pending and time.monotonic() < deadline:
        time.sleep(0.05)
        for child in list(_children.values()):
            child.poll()
        pending = [record for record in pending if record.alive]
    for record in pending:
        signal_quietly(record.pid, signal.SIGKILL)
    for record in waiting:
        # What the leader left behind in its session (workers, helpers).
        for pid in session_members(record.pid):
            signal_quietly(pid, signal.SIGKILL)
        record.forget()
    for child in list(_children.values()):
        child.poll()
