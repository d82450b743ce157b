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

"""A host that keeps its containers as files, for tests of the protocol.

It stands in for the runtime, which needs root: what is tested is the way
between a client and the methods of a host, and this one really does what it
is asked, to a directory. The agent with the real runtime is tested in
tests/runtime/test_agent.py.
"""

import contextlib
import hashlib
import json
import pathlib
import socket
import threading
import time

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import events
from nova_pycontainer.runtime import execute


class DirectoryHost:

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.log = events.EventLog()
        #: Let a test hold a verb at its beginning.
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.snapshots = self.consoles = self
        #: A snapshot fails after that many pieces.
        self.fail_after = None

    def _path(self, uuid):
        path = self.directory / uuid
        if not path.is_dir():
            raise errors.ContainerError(
                'not_found', f'there is no container of instance {uuid}',
                uuid=uuid, step='look', cause='no directory',
                remedy='Make one')
        return path

    def info(self, uuid):
        return json.loads((self._path(uuid) / 'info').read_text())

    def change(self, uuid, **changes):
        info = self.info(uuid) | changes
        (self._path(uuid) / 'info').write_text(json.dumps(info))
        return info

    def list(self):
        return [self.info(p.parent.name)
                for p in self.directory.glob('*/info')]

    def host_info(self):
        self.entered.release()
        self.gate.wait()
        return {'cpus': 2}

    def define(self, uuid, spec):
        path = self.directory / uuid
        path.mkdir()
        (path / 'info').write_text(json.dumps(
            {'uuid': uuid, 'state': 'defined', 'spec': spec}))
        return self.info(uuid)

    def prepare(self, uuid, changes=None):
        return self.change(uuid, state='created', changes=changes)

    def start_container(self, uuid):
        self.log.add('started', uuid)
        return self.change(uuid, state='running')

    def stop(self, uuid, timeout_s):
        self.entered.release()
        if not self.gate.wait(timeout_s):
            return {'code': None, 'signal': 9}
        self.change(uuid, state='stopped')
        self.log.add('stopped', uuid, {'code': 0})
        return {'code': 0, 'signal': None}

    def kill(self, uuid):
        return self.stop(uuid, 0)

    def reboot(self, uuid, timeout_s, changes=None):
        self.stop(uuid, timeout_s)
        return self.change(uuid, state='running', changes=changes)

    def pause(self, uuid):
        return self.change(uuid, state='paused')

    def unpause(self, uuid):
        return self.change(uuid, state='running')

    def delete(self, uuid, keep_disk=False):
        if not keep_disk:
            path = self._path(uuid)
            for file in path.iterdir():
                file.unlink()
            path.rmdir()

    def plug(self, uuid, nics):
        self.change(uuid, nics=nics)

    def unplug(self, uuid, devnames):
        self.change(uuid, nics=[
            nic for nic in self.info(uuid)['nics']
            if nic['devname'] not in devnames])

    def layer_present(self, key):
        return (self.directory / key).exists()

    def layer_list(self):
        return [{'key': p.name, 'bytes': p.stat().st_size}
                for p in self.directory.glob('sha512-*')]

    def layer_delete(self, key):
        (self.directory / key).unlink()

    def layer_import(self, key, stream, *, image, max_bytes, digest):
        target = self.directory / key
        if target.exists():
            return {'key': key, 'bytes': target.stat().st_size}
        hasher = hashlib.new(digest[0] if digest else 'sha512')
        partial = target.with_suffix('.partial')
        try:
            with partial.open('wb') as f:
                while data := stream.read(65536):
                    hasher.update(data)
                    f.write(data)
                    if max_bytes is not None and f.tell() > max_bytes:
                        raise errors.ContainerError(
                            'image_too_large', f'image {image!r} is too '
                            f'large for {max_bytes} bytes')
            if digest and hasher.hexdigest() != digest[1]:
                raise errors.ContainerError(
                    'invalid', 'the digest is another one')
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
        return {'key': key, 'bytes': target.stat().st_size}

    @contextlib.contextmanager
    def take(self, uuid, gone):
        """A snapshot is the console's log, many times over."""
        data = (self._path(uuid) / 'console.log').read_bytes()
        partial = self.directory / 'snapshot.partial'

        def pieces():
            for number in range(100):
                if gone() or number == self.fail_after:
                    raise errors.ContainerError('aborted', 'given up')
                yield data

        partial.touch()
        try:
            yield pieces()
        finally:
            partial.unlink()

    def exec(self, uuid, argv, *, stdin=b'', env=None, timeout_s=30.0,
             max_output=1 << 20):
        self._path(uuid)
        if argv == ['fail']:
            raise ZeroDivisionError('a bug, with a secret path')
        return execute.ExecResult(
            exit_code=len(argv), stdout=stdin[::-1], stderr=b'\xff\0',
            truncated=False)

    def console_log(self, uuid, max_bytes=102400):
        return (self._path(uuid) / 'console.log').read_bytes()[-max_bytes:]

    def connect(self, uuid, accept):
        """An echo that outlives the server, as the keeper does."""
        self._path(uuid)
        # A copy: the server closes its own.
        stream = socket.socket(fileno=accept().dup().detach())
        stream.setblocking(True)

        def echo():
            with stream, contextlib.suppress(BrokenPipeError):
                stream.sendall(b'login: ')
                while data := stream.recv(4096):
                    stream.sendall(data.upper())

        threading.Thread(target=echo, daemon=True).start()

    def events(self, after, timeout_s):
        return self.log.after(after, timeout_s)

    def wait_entered(self):
        """Until a gated verb has begun."""
        assert self.entered.acquire(timeout=60)

    def wait_gone(self, name):
        end = time.monotonic() + 60
        while list(self.directory.glob(name)):
            assert time.monotonic() < end, f'{name} is still there'
            time.sleep(0.01)
