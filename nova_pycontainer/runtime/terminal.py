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

"""The pseudo-terminal that is a container's console."""

import collections.abc as cabc
import fcntl
import os
import pathlib
import socket
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import syscalls

_T = ty.TypeVar('_T')

#: Seconds for the OCI runtime to send it.
_TIMEOUT = 10.0
_TIOCSPTLCK = 0x40045431


def receive(
    path: pathlib.Path, create: cabc.Callable[[], _T]
) -> tuple[_T, int]:
    """Have a container made, and get its console's master.

    The OCI runtime sends it to ``--console-socket``.

    :param path: of that socket, which is made for it
    :param create: makes the container
    :returns: what that returned, and the master
    :raises ContainerError: ``oci_failed``
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        try:
            server.listen(1)
            server.settimeout(_TIMEOUT)
            faults.point('create.listening')
            made = create()
            # The runtime has sent it before it ended.
            connection, _ = server.accept()
        finally:
            path.unlink(missing_ok=True)
    with connection:
        connection.settimeout(_TIMEOUT)
        _, fds, _, _ = socket.recv_fds(connection, 4096, 4)
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise errors.ContainerError(
            'oci_failed',
            f'the OCI runtime sent {len(fds)} consoles instead of one')
    return made, fds[0]


def make_first(pid: int) -> int:
    """Make a guest's first terminal, which no process had open.

    A devpts gives its lowest free number away, so that the first one is
    /dev/pts/0 again, which /dev/console leads to.

    :param pid: of a process of the guest
    :returns: its master
    """
    root = os.open(f'/proc/{pid}/root', os.O_PATH | os.O_DIRECTORY)
    try:
        fd = syscalls.openat2(
            root, 'dev/pts/ptmx', os.O_RDWR | os.O_NOCTTY,
            syscalls.RESOLVE_IN_ROOT)
    finally:
        os.close(root)
    fcntl.ioctl(fd, _TIOCSPTLCK, bytes(4))
    return fd
