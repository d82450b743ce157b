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

"""Work within a namespace of another process, setns(2)."""

import collections.abc as cabc
import contextlib
import os
import pathlib
import subprocess
import threading
import time
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import syscalls

_TIMEOUT = 10.0

_TYPES: ty.Final = {
    'mnt': syscalls.CLONE_NEWNS,
    'net': syscalls.CLONE_NEWNET,
}

T = ty.TypeVar('T')


def within(kind: str, pid: int, function: ty.Callable[[], T]) -> T:
    """Run ``function`` in a namespace of a process.

    In a thread of its own: a namespace is a thread's property; a thread that
    ends takes the change with it, and starting one costs a thousandth of a
    process.

    :param kind: ``mnt`` or ``net``
    :raises ContainerError: ``timeout``
    :raises OSError: the process is gone
    """
    fd = os.open(f'/proc/{pid}/ns/{kind}', os.O_RDONLY | os.O_CLOEXEC)

    def enter() -> None:
        if kind == 'mnt':
            # Root and working directory change with the namespace, and
            # threads share them unless they are told not to.
            syscalls.unshare(syscalls.CLONE_FS)
        syscalls.setns(fd, _TYPES[kind])

    try:
        return _in_thread(kind, enter, function)
    finally:
        os.close(fd)


def in_new(kind: str, function: ty.Callable[[], T]) -> T:
    """Run ``function`` in a namespace of its own, which ends with it.

    :param kind: ``net``
    :raises ContainerError: ``timeout``
    """
    return _in_thread(
        kind, lambda: syscalls.unshare(_TYPES[kind]), function)


def _in_thread(
    kind: str, enter: ty.Callable[[], None], function: ty.Callable[[], T]
) -> T:
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            enter()
            result.append(function())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=run, name=kind, daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    if failure:
        raise failure[0]
    if not result:
        raise errors.ContainerError(
            'timeout', f'the {kind} namespace does not answer')
    return result[0]


@contextlib.contextmanager
def user_and_time(base_id: int) -> cabc.Iterator[str]:
    """Make a user namespace, and in it a time namespace that begins now.

    The OCI runtimes make both, but crun cannot set the clocks: the kernel
    asks for root of the host then, and crun is root of the guest already. And
    CRIU dumps no time namespace that another user namespace owns. So a
    process makes them together, and the runtime joins them.

    Whole seconds are taken off, so the clocks begin with a fraction of one.
    The one that goes on while the host sleeps stays ahead of the other:
    programs rely on that.

    :param base_id: host id of the container's root
    :returns: directory of the namespaces, there until the end of the block;
        what has joined them keeps them
    :raises ContainerError: ``unsupported``
    """
    monotonic = time.clock_gettime(time.CLOCK_MONOTONIC)
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    argv = ['unshare', '--user', '--time', f'--monotonic={-int(monotonic)}',
            f'--boottime={-int(boottime - monotonic % 1)}', '--',
            'sh', '-c', 'echo; read line']
    with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={
                'PATH': '/usr/bin:/bin', 'LC_ALL': 'C'}) as process:
        # The end of the block closes its standard input, and it ends.
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.read(1) != b'\n':
            raise errors.ContainerError(
                'unsupported', 'a namespace for the guest\'s clocks cannot '
                'be made', cause=process.stderr.read(500).decode(
                    errors='replace').strip(),
                remedy='Install util-linux 2.36 or newer')
        for name in ('uid_map', 'gid_map'):
            pathlib.Path(f'/proc/{process.pid}/{name}').write_text(
                f'0 {base_id} {idmap.RANGE}')
        yield f'/proc/{process.pid}/ns'
