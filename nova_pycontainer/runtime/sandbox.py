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

"""A process that sees one directory and nothing else of the host.

::

    supervisor (root of the host)             worker
    ─────────────────────────────             ──────
    own mount, net, IPC, UTS, cgroup and
    PID namespaces
    fork ───────────────────────────────────► new user namespace
                       ◄───────────── step ──
    writes its id maps
                       ── step ─────────────► becomes uid 0 there, forbids
                                              user namespaces in its own
                       ◄───────────── step ──
    mounts the directory idmapped by that
    user namespace, makes it the root and
    drops the old one
                       ── step ─────────────► gives up all capabilities but
                                              those to write files
    waits                                     works

Only the user namespace belongs to the worker: the others were made by the
supervisor before, so that the worker, whatever takes it over, has no right
in them either. Its ids on the host are those of a range that nothing else
uses. The mount has its files' owners on disk shown in that range, so what
it writes as uid 0 to 65535 is on disk as 0 to 65535. Nothing can be executed
or opened as a device there, and no symbolic link is followed.
"""

import collections.abc as cabc
import ctypes
import errno
import os
import pathlib
import resource
import signal
import socket
import traceback
import typing as ty

from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import syscalls

_PR_SET_PDEATHSIG: ty.Final = 1
_PR_SET_DUMPABLE: ty.Final = 4
_PR_CAPBSET_DROP: ty.Final = 24
_PR_SET_NO_NEW_PRIVS: ty.Final = 38
_CAPABILITY_VERSION_3: ty.Final = 0x20080522
MOUNT_ATTR_NOSYMFOLLOW: ty.Final = 0x200000

#: What writing another's files takes (include/uapi/linux/capability.h).
CAPABILITIES: ty.Final = {
    'CAP_CHOWN': 0,
    'CAP_DAC_OVERRIDE': 1,
    'CAP_FOWNER': 3,
    'CAP_FSETID': 4,
    'CAP_SETFCAP': 31,
}

_libc: ty.Final = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result < 0:
        raise syscalls.oserror(call)


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), 'prctl')


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_capabilities(keep: cabc.Collection[int]) -> None:
    """Give up all capabilities but these, also for what is executed."""
    for capability in set(range(64)) - {*keep}:
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as e:
            if e.errno != errno.EINVAL:  # above the kernel's last one
                raise
    mask = sum(1 << capability for capability in keep)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xffffffff, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), 'capset')


def _limit_resources(limits: ty.Mapping[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for what, value in limits.items():
        # At the hard limit of processor time it is killed; at the soft one
        # it can still say why it stops.
        hard = value + 10 if what == resource.RLIMIT_CPU else value
        resource.setrlimit(what, (value, hard))


def enter(directory: pathlib.Path) -> None:
    """Make a mount the root of this mount namespace, and all of it."""
    os.chdir(directory)
    # pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of
    # the new one, and is taken off there. It changes the worker's root too.
    _check(_libc.pivot_root(b'.', b'.'), 'pivot_root')
    syscalls.umount('.', syscalls.MNT_DETACH)
    os.chdir('/')


def _mount_root(directory: pathlib.Path, userns: int) -> None:
    """Make ``directory`` the root of this mount namespace, and all of it."""
    tree = syscalls.open_tree(
        str(directory), syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    try:
        syscalls.mount_setattr(
            tree, userns_fd=userns, propagation=syscalls.MS_PRIVATE,
            attr_set=(syscalls.MOUNT_ATTR_IDMAP | syscalls.MOUNT_ATTR_NOSUID |
                      syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC |
                      MOUNT_ATTR_NOSYMFOLLOW))
        syscalls.move_mount(tree, str(directory))
    finally:
        os.close(tree)
    enter(directory)


def step(channel: socket.socket) -> None:
    """Tell the other side to go on, and wait until it has."""
    channel.send(b'.')
    if not channel.recv(1):
        raise EOFError('the other side of the sandbox has failed')


def become_root(channel: socket.socket) -> None:
    """Be root in a user namespace of one's own.

    The other side of the channel maps the ids at the first step, and changes
    the root directory at the second one.
    """
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    step(channel)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # After the change of user, which clears it.
    die_with_parent()
    # In a nested user namespace it would have all capabilities again.
    pathlib.Path('/proc/sys/user/max_user_namespaces').write_text('0')
    step(channel)
    os.chdir('/')


def give_up(
    keep: cabc.Collection[int], limits: ty.Mapping[int, int]
) -> None:
    """Keep no rights but some capabilities, and no descriptors but 0 to 2.

    :param limits: resource limits (RLIMIT_*) and their values
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _limit_capabilities(keep)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    _limit_resources(limits)


def _become_worker(
    channel: socket.socket, limits: ty.Mapping[int, int]
) -> None:
    become_root(channel)
    if os.listdir('/'):
        raise RuntimeError('the directory to unpack into is not empty')
    channel.close()
    give_up(CAPABILITIES.values(), limits)
    os.umask(0)


def map_ids(pid: int, base: int) -> None:
    """Give a process in a new user namespace the ids from ``base`` on."""
    for name in ('uid_map', 'gid_map'):
        pathlib.Path(f'/proc/{pid}/{name}').write_text(
            f'0 {base} {idmap.RANGE}')


def run(
    directory: pathlib.Path, base: int, limits: ty.Mapping[int, int],
    work: ty.Callable[[], int],
) -> int:
    """Run ``work`` in the sandbox and return its exit code, or 128 + signal.

    To be called in a process of one thread that does nothing else: it leaves
    this process in the sandbox's mount namespace. The worker has the standard
    descriptors of its caller and no others.

    :param directory: empty; the worker's root directory
    :param base: first host id of a range of 65536 that no one else uses
    :param limits: resource limits (RLIMIT_*) and their values
    :raises OSError: the kernel refused a step
    """
    os.setgroups([])
    syscalls.unshare(
        syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC |
        syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWPID |
        syscalls.CLONE_NEWCGROUP)
    host = os.open('/', os.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(
        host, propagation=syscalls.MS_PRIVATE, recursive=True)
    os.close(host)
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours.close()
            _become_worker(theirs, limits)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    # The worker alone holds the stream's reading end: when it stops, so
    # does whoever feeds it.
    null = os.open('/dev/null', os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    # If the worker fails in between it has said why, and its exit code is
    # below.
    if ours.recv(1):
        map_ids(pid, base)
        userns = os.open(f'/proc/{pid}/ns/user', os.O_RDONLY | os.O_CLOEXEC)
        ours.send(b'.')
        if ours.recv(1):
            _mount_root(directory, userns)
            ours.send(b'.')
        os.close(userns)
    ours.close()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code
