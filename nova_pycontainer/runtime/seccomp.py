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

"""The default seccomp profile.

A system container needs most of the kernel's interface, and its user
namespace already takes away what would reach beyond it. So the profile names
what is refused, for one of three reasons:

* old or dangerous interfaces that no distribution needs in a container and
  that have been a way out of one;
* what CRIU cannot dump, or would restore without its effect: a guest that
  never gets such an object stays live-migratable, and programs that probe
  for it (systemd's sandboxing, io_uring users) fall back;
* calls whose flags seccomp cannot see (clone3), so that the C library falls
  back to one whose flags it can.
"""

import errno
import platform
import socket
import typing as ty

from nova_pycontainer.runtime import errors

_ARCHITECTURES: ty.Final[dict[str, list[str]]] = {
    'x86_64': ['SCMP_ARCH_X86_64', 'SCMP_ARCH_X86', 'SCMP_ARCH_X32'],
    'aarch64': ['SCMP_ARCH_AARCH64', 'SCMP_ARCH_ARM'],
    'ppc64le': ['SCMP_ARCH_PPC64LE'],
    's390x': ['SCMP_ARCH_S390X', 'SCMP_ARCH_S390'],
}

#: Never, in any container.
_DANGEROUS = (
    'acct', 'add_key', 'delete_module', 'fanotify_init', 'finit_module',
    'init_module', 'ioperm', 'iopl', 'kexec_file_load', 'kexec_load',
    'keyctl', 'lookup_dcookie', 'nfsservctl', 'open_by_handle_at',
    'perf_event_open', 'quotactl', 'quotactl_fd', 'request_key', 'swapoff',
    'swapon', 'userfaultfd', 'vhangup', 'vm86', 'vm86old',
)

#: Unknown to CRIU. EPERM, since their users take that for "not allowed here".
_UNDUMPABLE_EPERM = ('bpf',)

#: Unknown to CRIU. ENOSYS, since their users take that for an older kernel.
#: A Landlock domain would silently be gone after a migration, which is worse
#: than a program that knows it has none.
_UNDUMPABLE_ENOSYS = (
    'io_uring_enter', 'io_uring_register', 'io_uring_setup',
    'landlock_add_rule', 'landlock_create_ruleset', 'landlock_restrict_self',
    'memfd_secret',
)

_NAMESPACE_FLAGS = {
    'CLONE_NEWNS': 0x00020000,
    'CLONE_NEWCGROUP': 0x02000000,
    'CLONE_NEWUTS': 0x04000000,
    'CLONE_NEWIPC': 0x08000000,
    'CLONE_NEWUSER': 0x10000000,
    'CLONE_NEWPID': 0x20000000,
    'CLONE_NEWNET': 0x40000000,
    'CLONE_NEWTIME': 0x00000080,
}

#: Socket families that CRIU does not know, and none that a guest's
#: distribution needs: AF_VSOCK would reach the hypervisor that this host may
#: run on.
_SOCKET_FAMILIES = {
    'AF_ALG': 38, 'AF_VSOCK': 40, 'AF_KCM': 41, 'AF_QIPCRTR': 42,
    'AF_SMC': 43, 'AF_XDP': 44, 'AF_TIPC': 30, 'AF_RDS': 21,
}

_IPPROTO_MPTCP = 262


def _errno(names: ty.Iterable[str], number: int) -> dict[str, ty.Any]:
    return {'names': sorted(names), 'action': 'SCMP_ACT_ERRNO',
            'errnoRet': number}


def _namespace_rules() -> list[dict[str, ty.Any]]:
    rules: list[dict[str, ty.Any]] = []
    # The flags of clone are its first argument everywhere but on s390,
    # which swaps it with the stack.
    clone_index = 1 if platform.machine() == 's390x' else 0
    for name, flag in _NAMESPACE_FLAGS.items():
        for call, index in (('unshare', 0), ('clone', clone_index)):
            if call == 'clone' and name == 'CLONE_NEWTIME':
                # In clone's flags this bit belongs to the exit signal.
                continue
            rule = _errno([call], errno.EPERM)
            rule['args'] = [{
                'index': index, 'value': flag, 'valueTwo': flag,
                'op': 'SCMP_CMP_MASKED_EQ'}]
            rules.append(rule)
    rules.append(_errno(['clone3'], errno.ENOSYS))
    return rules


def profile(*, nesting: bool = False) -> dict[str, ty.Any]:
    """Return the ``linux.seccomp`` object of an OCI configuration.

    :param nesting: let the guest make namespaces, so run containers itself.
        CRIU cannot dump most nested namespaces: such a guest is not
        live-migratable, and the driver says so.
    :raises ContainerError: ``unsupported`` on an unknown architecture: a
        filter that does not see the native calls would be no filter
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise errors.ContainerError(
            'unsupported', f'there is no seccomp profile for {machine}')
    syscalls = [
        _errno(_DANGEROUS, errno.EPERM),
        _errno(_UNDUMPABLE_EPERM, errno.EPERM),
        _errno(_UNDUMPABLE_ENOSYS, errno.ENOSYS),
    ]
    for family in _SOCKET_FAMILIES.values():
        rule = _errno(['socket', 'socketpair'], errno.EAFNOSUPPORT)
        rule['args'] = [{'index': 0, 'value': family, 'op': 'SCMP_CMP_EQ'}]
        syscalls.append(rule)
    for family in (socket.AF_INET, socket.AF_INET6):
        # CRIU cannot dump Multipath TCP, which servers in Go use unasked
        # since 1.24. They fall back to TCP.
        rule = _errno(['socket'], errno.EPROTONOSUPPORT)
        rule['args'] = [
            {'index': 0, 'value': int(family), 'op': 'SCMP_CMP_EQ'},
            {'index': 2, 'value': _IPPROTO_MPTCP, 'op': 'SCMP_CMP_EQ'}]
        syscalls.append(rule)
    if not nesting:
        syscalls += _namespace_rules()
    return {
        'defaultAction': 'SCMP_ACT_ALLOW',
        'architectures': _ARCHITECTURES[machine],
        'syscalls': syscalls,
    }
