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

import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import tempfile
import time

from nova_pycontainer.runtime import bundle
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import init as initd
from nova_pycontainer.runtime import oci

#: Enter the v1 cgroups, then become the command: what the guest starts must
#: count for the guest from its first page on.
_ENTER = 'while [ "$1" != -- ]; do echo 0 >"$1"; shift; done; shift; exec "$@"'


@dataclasses.dataclass(frozen=True)
class ExecResult:
    exit_code: int
    stdout: bytes
    stderr: bytes
    #: Output was longer than asked for, and cut.
    truncated: bool


def run(
    runtime: oci.OciRuntime,
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

    :raises ContainerError: ``timeout`` after ``timeout_s`` seconds, when the
        program has been killed; ``oci_failed``
    """
    caps = bundle.capabilities()
    process = {
        'terminal': False,
        'user': {'uid': user[0], 'gid': user[1]},
        'args': argv,
        'env': [f'{k}={v}' for k, v in
                (initd.base_env(target.uuid) | (env or {})).items()],
        'cwd': '/',
        'capabilities': {
            'bounding': caps, 'effective': caps, 'permitted': caps,
            'inheritable': [], 'ambient': []},
        'rlimits': bundle.rlimits(),
        'noNewPrivileges': False,
    }
    with tempfile.TemporaryDirectory(
            dir=target.bundle, prefix='exec-') as directory:
        file = pathlib.Path(directory, 'process.json')
        file.write_text(json.dumps(process))
        pid_file = pathlib.Path(directory, 'pid')
        command = runtime.exec_argv(target.uuid, file, pid_file)
        procs = [str(p) for p in target.cgroup.legacy_procs()]
        child = subprocess.Popen(
            ['sh', '-c', _ENTER, 'sh', *procs, '--', *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        try:
            out, err, cut = _communicate(
                child, stdin, time.monotonic() + timeout_s, max_output)
        except TimeoutError:
            _kill(pid_file)
            raise errors.ContainerError(
                'timeout', f'{argv[0]} did not end within {timeout_s:.0f} s',
                uuid=target.uuid) from None
        finally:
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe:
                    pipe.close()
            child.kill()
            child.wait()
    return ExecResult(child.returncode, out, err, cut)


def _kill(pid_file: pathlib.Path) -> None:
    """Kill the program itself: it outlives the runtime that started it."""
    try:
        fd = os.pidfd_open(int(pid_file.read_text()))
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    # The runtime is its parent and has not been waited for, so the pid is
    # still of that program.
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    os.close(fd)


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
