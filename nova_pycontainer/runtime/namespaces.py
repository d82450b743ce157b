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

import os
import threading
import typing as ty

from nova_pycontainer.runtime import errors
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
    result: list[T] = []
    failure: list[BaseException] = []
    fd = os.open(f'/proc/{pid}/ns/{kind}', os.O_RDONLY | os.O_CLOEXEC)

    def run() -> None:
        try:
            if kind == 'mnt':
                # Root and working directory change with the namespace, and
                # threads share them unless they are told not to.
                syscalls.unshare(syscalls.CLONE_FS)
            syscalls.setns(fd, _TYPES[kind])
            result.append(function())
        except BaseException as e:
            failure.append(e)

    try:
        thread = threading.Thread(target=run, name=kind, daemon=True)
        thread.start()
        thread.join(_TIMEOUT)
    finally:
        os.close(fd)
    if failure:
        raise failure[0]
    if not result:
        raise errors.ContainerError(
            'timeout', f'the {kind} namespace does not answer')
    return result[0]
