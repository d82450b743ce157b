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

"""What PID 1 of a container is, how it is started and told to shut down.
"""

import dataclasses
import enum
import os
import pathlib
import signal

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import syscalls

#: Where an init lies, in the order in which the Linux kernel and the
#: distributions' initramfs look.
CANDIDATES = (
    '/sbin/init', '/usr/sbin/init', '/lib/systemd/systemd',
    '/usr/lib/systemd/systemd', '/etc/init', '/bin/init', '/init',
)


class Kind(enum.StrEnum):
    SYSTEMD = 'systemd'
    SYSVINIT = 'sysvinit'
    BUSYBOX = 'busybox'
    OTHER = 'other'


@dataclasses.dataclass(frozen=True)
class Init:
    """PID 1: its command line, and how to ask it for a shutdown.

    ``stop_signal`` None means that a command in the guest has to be run.
    """

    kind: Kind
    argv: tuple[str, ...]
    env: dict[str, str]
    stop_signal: int | None
    stop_argv: tuple[str, ...] | None = None


#: Units that make what CRIU cannot dump (hugetlbfs, fusectl, configfs,
#: debugfs and tracefs mounts, the binfmt automount, an audit socket). None
#: has a use in a container; the image stays as it is.
_SYSTEMD_MASKED = (
    'dev-hugepages.mount', 'sys-fs-fuse-connections.mount',
    'sys-kernel-config.mount', 'sys-kernel-debug.mount',
    'sys-kernel-tracing.mount', 'proc-sys-fs-binfmt_misc.automount',
    'systemd-journald-audit.socket',
)

#: Written below /run before systemd starts. The kernel loses PSI triggers in
#: a restore, and their holders (PID 1, journald, logind) would spin on a dead
#: descriptor. So would a user's own manager, whose unit asks for that, and
#: the services of it.
SYSTEMD_DROP_INS = (
    ('/run/systemd/system.conf.d/50-pycontainer.conf',
     '[Manager]\nDefaultMemoryPressureWatch=off\n'),
    ('/run/systemd/system/user@.service.d/50-pycontainer.conf',
     '[Service]\nMemoryPressureWatch=off\n'),
    ('/run/systemd/user.conf.d/50-pycontainer.conf',
     '[Manager]\nDefaultMemoryPressureWatch=off\n'),
)

_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'


def base_env(uuid: str) -> dict[str, str]:
    """The environment of every PID 1.

    ``container`` and ``container_uuid`` are systemd's container interface
    (https://systemd.io/CONTAINER_INTERFACE). ``product_name`` is what
    cloud-init's ds-identify reads from /proc/1/environ in a container, as
    libvirt's LXC driver for Nova set it: it makes cloud-init look for the
    metadata service.
    """
    return {
        'PATH': _PATH,
        'TERM': 'vt220',
        'container': 'oci',
        'container_uuid': uuid,
        'product_name': 'OpenStack Nova',
    }


def _read_link_target(root: pathlib.Path, path: str) -> str:
    """The path inside ``root`` that ``path`` leads to, links resolved."""
    dirfd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        fd = syscalls.openat2(
            dirfd, path, os.O_PATH, syscalls.RESOLVE_IN_ROOT)
    finally:
        os.close(dirfd)
    try:
        real = os.readlink(f'/proc/self/fd/{fd}')
    finally:
        os.close(fd)
    return '/' + os.path.relpath(real, os.path.realpath(root))


def find(root: pathlib.Path) -> str | None:
    """Return the first init that the tree has, or None."""
    for path in CANDIDATES:
        try:
            target = _read_link_target(root, path)
        except OSError:
            continue
        status = os.lstat(root / target.lstrip('/'))
        if status.st_mode & 0o111 and os.path.isfile(
                root / target.lstrip('/')):
            return path
    return None


def classify(root: pathlib.Path, path: str) -> Kind:
    try:
        target = _read_link_target(root, path)
    except OSError:
        return Kind.OTHER
    name = os.path.basename(target)
    if name == 'systemd':
        return Kind.SYSTEMD
    if name.startswith('busybox'):
        return Kind.BUSYBOX
    if name == 'init':
        # sysvinit is the one that answers to initctl's pipe by telinit.
        for telinit in ('/sbin/telinit', '/usr/sbin/telinit'):
            try:
                if _read_link_target(root, telinit) == target:
                    return Kind.SYSVINIT
            except OSError:
                continue
    return Kind.OTHER


def make(
    root: pathlib.Path,
    uuid: str,
    *,
    argv: list[str] | None = None,
    env: dict[str, str] | None = None,
    stop_signal: str | None = None,
) -> Init:
    """Describe the init of a container whose tree is ``root``.

    :param argv: another program than the image's init
    :param stop_signal: name of the signal that asks it to shut down
    :raises ContainerError: ``image_no_init``, ``invalid``
    """
    path = argv[0] if argv else find(root)
    if path is None:
        raise errors.ContainerError(
            'image_no_init', 'the image has no init',
            cause=f'none of {", ".join(CANDIDATES)} is an executable file',
            remedy='Use an image of a whole system, or name its program in '
                   'the image property pycontainer_init')
    kind = classify(root, path)
    environment = base_env(uuid)
    arguments: list[str] = list(argv) if argv else [path]
    signo: int | None
    stop_argv: tuple[str, ...] | None = None
    match kind:
        case Kind.SYSTEMD:
            environment['MEMORY_PRESSURE_WATCH'] = '/dev/null'
            arguments += [f'systemd.mask={unit}' for unit in _SYSTEMD_MASKED]
            # systemd(1), "Signals": SIGRTMIN+4 starts poweroff.target.
            signo = signal.SIGRTMIN + 4
        case Kind.BUSYBOX:
            # busybox init: SIGUSR2 is poweroff (SIGTERM would be reboot).
            signo = signal.SIGUSR2
        case Kind.SYSVINIT:
            # No signal of sysvinit's means "halt"; SIGINT would be
            # ctrl-alt-del, so a reboot.
            signo, stop_argv = None, (path, '0')
        case _:
            signo = signal.SIGTERM
    if stop_signal is not None:
        try:
            signo, stop_argv = _signal_number(stop_signal), None
        except (KeyError, ValueError):
            raise errors.ContainerError(
                'invalid', f'{stop_signal!r} is not the name of a signal',
                uuid=uuid) from None
    environment.update(env or {})
    return Init(kind, tuple(arguments), environment, signo, stop_argv)


def _signal_number(name: str) -> int:
    name = name.upper()
    if not name.startswith('SIG'):
        name = 'SIG' + name
    base, plus, offset = name.partition('+')
    number = int(signal.Signals[base]) + (int(offset) if plus else 0)
    return int(signal.Signals(number)) if not plus else number
