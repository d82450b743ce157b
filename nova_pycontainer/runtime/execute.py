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

"""Run a program inside a container and bring back what it says."""

import base64
import dataclasses
import json
import os
import pathlib
import selectors
import subprocess
import sys
import time

from nova_pycontainer.runtime import bundle
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import init as initd
from nova_pycontainer.runtime import seccomp
from nova_pycontainer.runtime import seccomp_bpf

_INSIDE = pathlib.Path(__file__).with_name('exec_inside.py')
_END_TIMEOUT = 10.0


@dataclasses.dataclass(frozen=True)
class ExecResult:
    exit_code: int
    stdout: bytes
    stderr: bytes
    #: Output was longer than asked for, and cut.
    truncated: bool


def run(
    target: container.Container,
    argv: list[str],
    *,
    stdin: bytes = b'',
    env: dict[str, str] | None = None,
    user: tuple[int, int] = (0, 0),
    timeout_s: float = 30.0,
    max_output: int = 1 << 20,
) -> ExecResult:
    """Run ``argv`` in a running container.

    :returns: exit codes as of a shell: 126 and 127 for a program that cannot
        be run or found, 128 + n for one that died of signal n
    :raises ContainerError: ``timeout`` after ``timeout_s`` seconds, when the
        program has been killed
    """
    assert target.st.run is not None
    caps = [bundle.CAPABILITIES[name] for name in bundle.capabilities()]
    profile = seccomp.profile(nesting=target.spec.nesting)
    document = json.dumps({
        'pid': target.st.run['process']['pid'],
        'argv': argv,
        'env': initd.base_env(target.uuid) | (env or {}),
        'user': {'uid': user[0], 'gid': user[1]},
        'capabilities': caps,
        'rlimits': bundle.rlimits(),
        'seccomp': base64.b64encode(
            seccomp_bpf.compile_profile(profile)).decode(),
        'cgroup_procs': [str(p) for p in target.cgroup.exec_procs()],
    }).encode()
    fd = os.memfd_create('exec', os.MFD_CLOEXEC)
    try:
        os.write(fd, document)
        os.lseek(fd, 0, os.SEEK_SET)
        child = subprocess.Popen(
            [sys.executable, '-I', '-S', str(_INSIDE), str(fd)],
            pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
    finally:
        os.close(fd)
    try:
        out, err, cut = _communicate(
            child, stdin, time.monotonic() + timeout_s, max_output)
    except TimeoutError:
        child.terminate()
        raise errors.ContainerError(
            'timeout', f'{argv[0]} did not end within {timeout_s:.0f} s',
            uuid=target.uuid) from None
    finally:
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe:
                pipe.close()
        _reap(child)
    return ExecResult(child.returncode, out, err, cut)


def _reap(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        # Its program is of a frozen container, or stuck in the kernel.
        child.kill()
        child.wait()


def _communicate(
    child: subprocess.Popen[bytes], stdin: bytes, deadline: float, limit: int
) -> tuple[bytes, bytes, bool]:
    """Like Popen.communicate, with a limit on what a guest can make us hold.
    """
    assert child.stdin and child.stdout and child.stderr
    output: dict[int, bytearray] = {
        child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    cut = False
    pending = memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        for fd in output:
            selector.register(fd, selectors.EVENT_READ)
        os.set_blocking(child.stdin.fileno(), False)
        selector.register(child.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            for key, _ in selector.select(remaining):
                if key.fileobj is child.stdin:
                    try:
                        pending = pending[os.write(
                            child.stdin.fileno(), pending[:65536]):]
                    except BrokenPipeError:
                        pending = pending[:0]
                    if not pending:
                        selector.unregister(child.stdin)
                        child.stdin.close()
                    continue
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                    continue
                room = limit - len(output[key.fd])
                cut = cut or len(data) > room
                output[key.fd] += data[:max(room, 0)]
    try:
        child.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    out, err = output.values()
    return bytes(out), bytes(err), cut
