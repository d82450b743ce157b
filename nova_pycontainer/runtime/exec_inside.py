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

"""Enters a container and becomes a program in it.

Run as a program of its own by :mod:`.execute`, with one JSON document on
the descriptor that is its argument. Only the standard library, and no
threads: the kernel lets only a process without them enter a user namespace.

The container may have come from another host, so nothing here asks the OCI
runtime: what it enters are the namespaces of the init, what it becomes is
what the bundle says.
"""

import base64
import ctypes
import json
import os
import resource
import signal
import sys
import typing as ty

CLONE_NEWTIME = 0x00000080
NAMESPACES = {
    'mnt': 0x00020000, 'cgroup': 0x02000000, 'uts': 0x04000000,
    'ipc': 0x08000000, 'user': 0x10000000, 'pid': 0x20000000,
    'net': 0x40000000, 'time': CLONE_NEWTIME,
}
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
LAST_CAP = 63

_libc = ctypes.CDLL(None, use_errno=True)


class _Fprog(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]


class _CapHeader(ctypes.Structure):
    _fields_ = [('version', ctypes.c_uint32), ('pid', ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [('effective', ctypes.c_uint32),
                ('permitted', ctypes.c_uint32),
                ('inheritable', ctypes.c_uint32)]


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f'{call}: {os.strerror(number)}')


def _prctl(*arguments: int) -> int:
    return int(_libc.prctl(*(ctypes.c_ulong(a) for a in (
        *arguments, 0, 0, 0, 0)[:5])))


def _enter(pid: int) -> None:
    """Enter all namespaces of the init at once, as setns(2) on a pidfd can.

    The host's own are left out: asking for the user namespace that one is in
    is an error.
    """
    flags = 0
    for name, flag in NAMESPACES.items():
        theirs = f'/proc/{pid}/ns/{name}'
        if os.path.exists(theirs) and os.readlink(theirs) != os.readlink(
                f'/proc/self/ns/{name}'):
            flags |= flag
    fd = os.pidfd_open(pid)
    _check(_libc.setns(fd, flags), 'setns')
    os.close(fd)


def _capabilities(numbers: list[int]) -> None:
    for number in range(LAST_CAP + 1):
        if number not in numbers and _prctl(PR_CAPBSET_DROP, number) < 0:
            break
    data = (_CapData * 2)()
    for number in numbers:
        word, bit = divmod(number, 32)
        data[word].effective |= 1 << bit
        data[word].permitted |= 1 << bit
    header = _CapHeader(0x20080522, 0)
    _check(_libc.capset(ctypes.byref(header), data), 'capset')


def _seccomp(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    prog = _Fprog(len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER),
        ctypes.byref(prog), 0, 0), 'seccomp')


def _become(document: dict[str, ty.Any]) -> None:
    os.setsid()
    os.chdir('/')
    user = document['user']
    os.setgroups([])
    os.setresgid(user['gid'], user['gid'], user['gid'])
    # Root of the container first: its capabilities are what drops the rest.
    os.setresuid(0, 0, 0)
    _capabilities(document['capabilities'])
    _seccomp(base64.b64decode(document['seccomp']))
    if user['uid']:
        os.setresuid(user['uid'], user['uid'], user['uid'])
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            continue
    _execute(document['argv'], document['env'])


def _execute(argv: list[str], env: dict[str, str]) -> None:
    """As os.execvpe, which would import a module of the guest's by now.

    :raises FileNotFoundError: there is no such program
    :raises PermissionError: there is one that may not be executed
    """
    if '/' in argv[0]:
        os.execve(argv[0], argv, env)
    refused = None
    for directory in env.get('PATH', '').split(':'):
        try:
            os.execve(f'{directory or "."}/{argv[0]}', argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as e:
            refused = e
    raise refused or FileNotFoundError(argv[0])


def main() -> int:
    with os.fdopen(int(sys.argv[1])) as f:
        document = json.load(f)
    for path in document['cgroup_procs']:
        with open(path, 'w') as f:
            f.write('0')
    # Root of a container may not raise a hard limit.
    for item in document['rlimits']:
        number = getattr(resource, item['type'])
        resource.setrlimit(number, (item['soft'], item['hard']))
    # Nothing of the guest may look into this process (CVE-2019-5736: its
    # program is the host's).
    _check(_prctl(PR_SET_DUMPABLE, 0), 'prctl')
    # From here on every file is the guest's: nothing is imported any more.
    sys.meta_path.clear()
    _enter(document['pid'])
    try:
        child = os.fork()
    except OSError as e:
        # Mostly a guest that has as many processes as it may.
        print(f'{document["argv"][0]}: Cannot fork in the container: '
              f'{e.strerror}', file=sys.stderr)
        return 125
    if child == 0:
        try:
            _become(document)
        except FileNotFoundError:
            print(f'{document["argv"][0]}: not found', file=sys.stderr)
            os._exit(127)
        except PermissionError as e:
            print(e, file=sys.stderr)
            os._exit(126)
        except BaseException as e:
            print(e, file=sys.stderr)
            os._exit(125)
    # Whoever gives up on the program kills it through us.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    for fd in (0, 1, 2):
        os.close(fd)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == '__main__':
    os._exit(main())
