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

"""A seccomp profile as the program that the kernel takes.

The OCI runtime compiles the profile for a container's init. A program that is
run in the container later has to get the same filter, also when the container
has come from another host and the runtime knows nothing of it. libseccomp,
which every OCI runtime is linked with, does the compiling.
"""

import ctypes
import functools
import json
import os
import typing as ty

from nova_pycontainer.runtime import errors

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_OPERATORS = {'SCMP_CMP_EQ': 4, 'SCMP_CMP_MASKED_EQ': 7}
_UNKNOWN = -1  # __NR_SCMP_ERROR


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = [
        ('arg', ctypes.c_uint), ('op', ctypes.c_int),
        ('datum_a', ctypes.c_uint64), ('datum_b', ctypes.c_uint64)]


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL('libseccomp.so.2')
    except OSError as e:
        raise errors.ContainerError(
            'unsupported', 'libseccomp is not installed', cause=str(e),
            remedy='Install libseccomp2') from e
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_release.argtypes = [ctypes.c_void_p]
    lib.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    lib.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_arch_exist.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    lib.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    lib.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint,
        ctypes.POINTER(_Compare)]
    lib.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return lib


def _check(result: int, what: str) -> None:
    # libseccomp returns negative error numbers.
    if result < 0:
        raise errors.ContainerError(
            'internal', f'libseccomp refuses {what}',
            cause=os.strerror(-result))


def compile_profile(profile: ty.Mapping[str, ty.Any]) -> bytes:
    """Compile a ``linux.seccomp`` object of an OCI configuration.

    :returns: an array of struct sock_filter, seccomp(2)
    :raises ContainerError: ``unsupported``, ``internal``
    """
    return _compile(json.dumps(profile, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _compile(text: str) -> bytes:
    profile = json.loads(text)
    lib = _library()
    context = lib.seccomp_init(_ALLOW)
    if not context:
        raise errors.ContainerError('internal', 'libseccomp does not start')
    try:
        for name in profile['architectures']:
            token = lib.seccomp_arch_resolve_name(
                name.removeprefix('SCMP_ARCH_').lower().encode())
            if lib.seccomp_arch_exist(context, token) != 0:
                _check(lib.seccomp_arch_add(context, token), name)
        for rule in profile['syscalls']:
            _add(lib, context, rule)
        fd = os.memfd_create('seccomp', os.MFD_CLOEXEC)
        try:
            _check(lib.seccomp_export_bpf(context, fd), 'the export')
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
    finally:
        lib.seccomp_release(context)


def _add(
    lib: ctypes.CDLL, context: int, rule: ty.Mapping[str, ty.Any]
) -> None:
    arguments = rule.get('args') or []
    compares = (_Compare * max(len(arguments), 1))(*[
        _Compare(a['index'], _OPERATORS[a['op']], a['value'],
                 a.get('valueTwo', 0)) for a in arguments])
    for name in rule['names']:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            # Newer than this libseccomp: the OCI runtime passes over it too.
            continue
        _check(lib.seccomp_rule_add_array(
            context, _ERRNO | int(rule['errnoRet']), number, len(arguments),
            compares), name)
