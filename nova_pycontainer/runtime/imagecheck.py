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

"""What an unpacked root file system is: its init, architecture and name.

The tree is untrusted: every path is opened within it (openat2(2),
RESOLVE_IN_ROOT), and only regular files are read.
"""

import collections.abc as cabc
import contextlib
import os
import pathlib
import shlex
import stat
import struct
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import init
from nova_pycontainer.runtime import syscalls

#: uname(2)'s machine by e_machine, ELF class (bits) and byte order of elf(5).
_MACHINES: ty.Final = {
    (62, 64, '<'): 'x86_64',
    (3, 32, '<'): 'i686',
    (183, 64, '<'): 'aarch64',
    (40, 32, '<'): 'armv7l',
    (21, 64, '<'): 'ppc64le',
    (21, 64, '>'): 'ppc64',
    (22, 64, '>'): 's390x',
    (243, 64, '<'): 'riscv64',
    (258, 64, '<'): 'loongarch64',
    (8, 64, '<'): 'mips64',
}
_SHELLS: ty.Final = (
    '/bin/sh', '/usr/bin/sh', '/bin/busybox', '/usr/bin/env', '/bin/bash')
#: Interpreters of interpreters that the kernel follows (fs/exec.c).
_MAX_INTERPRETERS: ty.Final = 4
_SEARCH: ty.Final = (
    '/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin',
    '/bin')


@contextlib.contextmanager
def _directory(root: pathlib.Path) -> cabc.Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _head(root_fd: int, path: str, size: int) -> tuple[int, bytes] | None:
    """Mode and first bytes of a regular file in the tree, else None."""
    try:
        # O_NONBLOCK: a fifo must not hold us up before it is recognised.
        fd = syscalls.openat2(
            root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
            syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        return status.st_mode, os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _machine(head: bytes) -> str | None:
    if not head.startswith(b'\x7fELF') or len(head) < 20:
        return None
    bits = {1: 32, 2: 64}.get(head[4], 0)
    order = {1: '<', 2: '>'}.get(head[5], '<')
    number, = struct.unpack_from(order + 'H', head, 18)
    return _MACHINES.get((number, bits, order), f'ELF {bits} bit {number}')


def _program(root_fd: int, path: str) -> str | None:
    """The machine of an executable file, through its interpreters.

    :returns: None where it cannot be told: not an ELF file in the end
    :raises LookupError: it, or an interpreter of it, is not there or not
        executable
    """
    for _ in range(_MAX_INTERPRETERS + 1):
        found = _head(root_fd, path, 256)
        if found is None:
            raise LookupError(f'there is no file {path!r}')
        mode, head = found
        if not mode & 0o111:
            raise LookupError(f'{path!r} is not executable')
        if not head.startswith(b'#!'):
            return _machine(head)
        words = head[2:].partition(b'\n')[0].split()
        if not words:
            return None
        path = os.fsdecode(words[0])
    return None


def arch(root: pathlib.Path) -> str | None:
    """The machine, as uname(2) names it, whose programs the tree holds.

    Told by the first of its init programs and shells that is an ELF file.
    """
    with _directory(root) as fd:
        for path in (*init.CANDIDATES, *_SHELLS):
            try:
                machine = _program(fd, path)
            except LookupError:
                continue
            if machine:
                return machine
    return None


def check_arch(machine: str | None) -> None:
    """Raise unless this host runs programs of that machine.

    :raises ContainerError: ``image_wrong_arch``
    """
    host = os.uname().machine
    if machine is not None and machine != host:
        raise errors.ContainerError(
            'image_wrong_arch', f'the image holds programs for {machine}, '
            f'and this host is {host}',
            remedy='Use an image for the right architecture, and set its '
            'property hw_architecture')


def _full_path(root_fd: int, program: str) -> str:
    if '/' in program:
        return program
    for directory in _SEARCH:
        if _head(root_fd, f'{directory}/{program}', 0):
            return f'{directory}/{program}'
    return program


def check_init(root: pathlib.Path, argv: cabc.Sequence[str] | None) -> str:
    """Return the path of the program that would be PID 1.

    :param argv: command line that replaces the image's init
    :raises ContainerError: ``image_no_init``, ``image_wrong_arch``
    """
    with _directory(root) as fd:
        if argv:
            path = _full_path(fd, argv[0])
            try:
                machine = _program(fd, path)
            except LookupError as e:
                raise errors.ContainerError(
                    'image_no_init', f'the image has no program '
                    f'{argv[0]!r} to start', cause=str(e),
                    remedy='Correct the command, or leave it out to start '
                    "the image's own init") from None
            check_arch(machine)
            return path
        reasons = []
        for path in init.CANDIDATES:
            try:
                machine = _program(fd, path)
            except LookupError as e:
                if _head(fd, path, 0):
                    reasons.append(f'{path}: {e}')
                continue
            check_arch(machine)
            return path
        remedy = ('Use an image of a whole system, or name its program in '
                  'the image property pycontainer_init')
        if _head(fd, '/manifest.json', 0) or _head(fd, '/oci-layout', 0):
            remedy = ('This looks like an archive of container layers with '
                      'other files beside them: upload it as "docker save" '
                      'or "skopeo copy" writes it')
    raise errors.ContainerError(
        'image_no_init', 'the image has no init', cause='; '.join(reasons) or
        f'none of {", ".join(init.CANDIDATES)} is an executable file',
        remedy=remedy)


def os_release(root: pathlib.Path) -> dict[str, str]:
    """ID, VERSION_ID and the like of os-release(5); empty if there is none."""
    with _directory(root) as fd:
        for path in ('/etc/os-release', '/usr/lib/os-release'):
            found = _head(fd, path, 16 << 10)
            if found:
                break
        else:
            return {}
    values = {}
    for line in found[1].decode('utf-8', 'replace').splitlines():
        key, equals, text = line.strip().partition('=')
        if not equals or not key.isidentifier():
            continue
        try:
            value = ''.join(shlex.split(text))[:200]
        except ValueError:
            continue
        if value.isprintable():
            values[key] = value
    return values
