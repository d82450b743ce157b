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

"""Starting the process that packs, and reading the archive from it."""

import collections.abc as cabc
import contextlib
import os
import select
import subprocess
import tempfile
import threading
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import pack

_MODULE: ty.Final = 'nova_pycontainer.runtime.pack'
_PIPE_BYTES: ty.Final = 1 << 20
_PIECE: ty.Final = 1 << 17
#: Seconds without a byte from the process.
_IDLE: ty.Final = 300.0
_END: ty.Final = 30.0


class Packing:
    """An archive that is being made. Iterate once over its pieces."""

    def __init__(self, python: str, job: pack.Job) -> None:
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [python, '-I', '-X', 'utf8', '-m', _MODULE, job.to_json()],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=self._errors, bufsize=0, pipesize=_PIPE_BYTES,
                cwd='/', start_new_session=True)
        except BaseException:
            self._errors.close()
            raise
        self._lock = threading.Lock()

    def __iter__(self) -> cabc.Iterator[bytes]:
        """:raises ContainerError: ``internal``, ``timeout``; what came before
            is not all of it then
        """
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            if not poll.poll(_IDLE * 1000):
                raise errors.ContainerError(
                    'timeout', 'reading the files of the instance came to a '
                    'halt', remedy='Look at the disk of this host')
            piece = os.read(fd, _PIECE)
            if not piece:
                break
            yield piece
        code = self._process.wait(_END)
        if code:
            size = os.fstat(self._errors.fileno()).st_size
            text = os.pread(self._errors.fileno(), 4096, max(size - 4096, 0))
            raise errors.ContainerError(
                'internal', 'the files of the instance cannot be packed',
                cause=f'exit code {code}: '
                + ascii(text.decode('utf-8', 'replace').strip()[-500:]),
                remedy='See the log of pycontainer-agent on that host')

    def kill(self) -> None:
        """End it; whoever iterates gets an error."""
        with self._lock:
            if self._process.returncode is None:
                self._process.kill()

    def close(self) -> None:
        """End it, and wait until its mounts are gone."""
        assert self._process.stdout is not None
        # tar ends when nobody reads. Its parent then ends by itself, and
        # with it the mounts; killed, it would do so some time later.
        self._process.stdout.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END)
        self._errors.close()
