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

"""The process that packs one root file system: ``python -m ...pack JOB``.

Standard output is a tar archive in POSIX's format with the ids, attributes and
holes that the guest sees. The exit code is 0 if that is all of it; otherwise
standard error says why.

GNU tar does it, in a root directory of its own: the programs and libraries of
the host, read-only, and the guest's files under ``/view``. It must not be the
guest's root, where the C library would load what the guest put there. tar is
root in a user namespace with the ids of the guest and may read everything of
the guest's, and nothing else. All mounts are in a mount namespace that ends
with this process.
"""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import socket
import sys
import traceback
import typing as ty

from nova_pycontainer.runtime import overlay
from nova_pycontainer.runtime import sandbox
from nova_pycontainer.runtime import syscalls

#: include/uapi/linux/capability.h
_CAP_DAC_READ_SEARCH: ty.Final = 2
_LIMITS: ty.Final = {
    # tar remembers every file with several names that it has not seen all of.
    resource.RLIMIT_AS: 2 << 30,
    # What it has to say goes into a file.
    resource.RLIMIT_FSIZE: 1 << 20,
    resource.RLIMIT_NOFILE: 256,
}
#: Where programs and their libraries are.
_SYSTEM: ty.Final = ('usr', 'bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32')
_VIEW: ty.Final = 'view'
_PROTECTED: ty.Final = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID |
    syscalls.MOUNT_ATTR_NODEV)

_TAR: ty.Final = (
    '--create', '--file=-', f'--directory=/{_VIEW}',
    '--format=posix',
    # The process's id is no part of an image, and neither is when somebody
    # has read a file.
    '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime',
    '--sort=name', '--numeric-owner', '--sparse', '--acls', '--xattrs',
    '--xattrs-include=user.*', '--xattrs-include=security.capability', '.')


@dataclasses.dataclass(frozen=True)
class Job:
    """What the process is told, in one argument.

    :param layer: root directory of the layer
    :param upper: what the guest has changed, at rest; what the index of its
        overlay knows is in it by name
    :param base: first host id of the container
    :param root: empty directory to work in
    """

    layer: str
    upper: str
    base: int
    root: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> 'Job':
        return cls(**json.loads(text))


def _mount_tmpfs(target: pathlib.Path) -> None:
    context = syscalls.fsopen('tmpfs')
    try:
        for key, value in (('size', '1m'), ('mode', '755')):
            syscalls.fsconfig_string(context, key, value)
        syscalls.fsconfig_create(context)
        tree = syscalls.fsmount(
            context, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)
    try:
        syscalls.move_mount(tree, str(target))
    finally:
        os.close(tree)


def _show_system(root: pathlib.Path) -> None:
    """Show the programs and libraries of the host below ``root``."""
    for name in _SYSTEM:
        source = pathlib.Path('/') / name
        if source.is_symlink():
            (root / name).symlink_to(os.readlink(source))
        elif source.is_dir():
            (root / name).mkdir()
            tree = syscalls.open_tree(
                str(source),
                syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
            try:
                syscalls.mount_setattr(tree, attr_set=_PROTECTED)
                syscalls.move_mount(tree, str(root / name))
            finally:
                os.close(tree)


def _mount(job: Job) -> pathlib.Path:
    """:returns: the root directory to be"""
    root = pathlib.Path(job.root)
    _mount_tmpfs(root)
    _show_system(root)
    view = root / _VIEW
    overlay.view(
        view, layer=pathlib.Path(job.layer), upper=pathlib.Path(job.upper),
        base_id=job.base)
    tree = syscalls.open_tree(str(view), syscalls.OPEN_TREE_CLOEXEC)
    try:
        syscalls.mount_setattr(tree, attr_set=(
            _PROTECTED | syscalls.MOUNT_ATTR_NOEXEC |
            sandbox.MOUNT_ATTR_NOSYMFOLLOW))
    finally:
        os.close(tree)
    return root


def _pack(channel: socket.socket, program: str) -> ty.NoReturn:
    sandbox.become_root(channel)
    channel.close()
    sandbox.give_up((_CAP_DAC_READ_SEARCH,), _LIMITS)
    os.execve(program, ['tar', *_TAR], {'LC_ALL': 'C'})


def _run(job: Job, program: str) -> int:
    os.setgroups([])
    syscalls.unshare(
        syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC |
        syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP)
    host = os.open('/', os.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(
        host, propagation=syscalls.MS_PRIVATE, recursive=True)
    os.close(host)
    root = _mount(job)
    # From here on the next child is the first process of a namespace, which
    # ends with it.
    syscalls.unshare(syscalls.CLONE_NEWPID)
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _pack(theirs, program)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    # When the worker ends, so does the archive.
    null = os.open('/dev/null', os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)
    # If the worker fails in between it has said why, and its exit code is
    # below.
    if ours.recv(1):
        sandbox.map_ids(pid, job.base)
        ours.send(b'.')
        if ours.recv(1):
            sandbox.enter(root)
            ours.send(b'.')
    ours.close()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    job = Job.from_json(arguments[0])
    sandbox.die_with_parent()
    program = shutil.which('tar', path='/usr/bin:/bin')
    if program is None:
        print('tar is not installed', file=sys.stderr)
        return 127
    return _run(job, program)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
