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

"""Two hosts' agents in one process, over real sockets and real TLS."""

import contextlib
import gc
import os
import pathlib
import queue
import socket
import tempfile
import threading
import time
import uuid as uuidlib

import fixtures
import testtools

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import listener

#: Seconds after which something will not come any more.
PATIENCE = 60


def until(condition, what):
    """Wait for something that comes soon, on any machine."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f'{what} did not come')
        time.sleep(0.01)


def descriptors():
    """What each of the process's descriptors is."""
    found = {}
    for fd in os.listdir('/proc/self/fd'):
        # The one that lists the directory is gone by now.
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f'/proc/self/fd/{fd}')
    return found


def our_threads():
    return {t for t in threading.enumerate()
            if t.name.startswith(('channel-', 'relay-'))}


class ChannelTestCase(testtools.TestCase):
    """Hosts A (dials) and B (listens).

    After each test there must be as many descriptors and threads as before.
    """

    HELLO_TIMEOUT = 30.0

    def setUp(self):
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger(
            'nova_pycontainer.runtime.migration'))
        directory = tempfile.TemporaryDirectory(prefix='pyc-channel-')
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)
        self.a = keys.Identity.load_or_create(self.dir / 'a', 'host-a')
        self.b = keys.Identity.load_or_create(self.dir / 'b', 'host-b')
        gc.collect()
        self.fds = descriptors()
        self.threads = our_threads()
        self.addCleanup(self.check_leaks)
        self.migration = str(uuidlib.uuid4())
        self.instance = str(uuidlib.uuid4())
        self.accepted = queue.Queue()
        self.addCleanup(self.hang_up)
        self.seq = 0
        self.listener = self.listen()

    def check_leaks(self):
        gc.collect()
        until(lambda: our_threads() <= self.threads,
              f'the end of {our_threads()}')
        until(lambda: len(descriptors()) <= len(self.fds),
              f'the closing of {descriptors()}, not {self.fds}')

    def hang_up(self):
        with contextlib.suppress(queue.Empty):
            while True:
                self.accepted.get_nowait().abort()

    def listen(self, identity=None, on_connection=None, **kwargs):
        kwargs.setdefault('hello_timeout', self.HELLO_TIMEOUT)
        result = listener.Listener(
            '127.0.0.1', (0, 0), identity or self.b,
            on_connection or self.accepted.put, **kwargs)
        self.addCleanup(result.close)
        return result

    def expect(self, certificate=None, **kwargs):
        arguments = {
            'migration': self.migration, 'instance': self.instance,
            'peer': keys.Peer(certificate or self.a.certificate),
            'roles': channel.ROLES, 'expires_s': 3600}
        self.listener.expect(**arguments | kwargs)

    def hello(self, role='control', **kwargs):
        self.seq += 1
        arguments = {'migration': self.migration, 'instance': self.instance,
                     'role': role, 'seq': self.seq}
        return channel.Hello(**arguments | kwargs)

    def dial(self, role='control', identity=None, peer=None, port=None,
             timeout=PATIENCE, **kwargs):
        """The dialling side's connection."""
        connection = channel.connect(
            '127.0.0.1', port or self.listener.port, identity or self.a,
            peer or keys.Peer(self.b.certificate),
            self.hello(role, **kwargs), timeout)
        self.addCleanup(connection.abort)
        return connection

    def pair(self, role='control', **kwargs):
        """Both sides' connections."""
        ours = self.dial(role, **kwargs)
        while True:
            theirs = self.accepted.get(timeout=PATIENCE)
            self.addCleanup(theirs.abort)
            if theirs.hello == ours.hello:
                return ours, theirs

    def refused(self, call, *args, code='forbidden', **kwargs):
        """The error with which a call fails."""
        error = self.assertRaises(errors.ContainerError, call, *args,
                                  **kwargs)
        self.assertEqual(code, error.code, str(error))
        return error

    def tcp(self, port=None):
        """A connection without TLS."""
        sock = socket.create_connection(
            ('127.0.0.1', port or self.listener.port), PATIENCE)
        self.addCleanup(sock.close)
        return sock

    def tls(self, identity=None, **kwargs):
        """A connection with TLS, and nothing said yet.

        Blocking, by Python's own means and not ours.
        """
        context = (identity or self.a).context(
            [keys.Peer(self.b.certificate)], server=False)
        for name, value in kwargs.items():
            setattr(context, name, value)
        sock = self.tcp()
        wrapped = context.wrap_socket(sock, suppress_ragged_eofs=False)
        self.addCleanup(wrapped.close)
        return wrapped

    def assertEnds(self, sock):
        """The other side closes it, with or without words."""
        try:
            while sock.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:
            pass

    def assertLogged(self, text):
        until(lambda: text in self.log.output,
              f'{text!r} in the log: {self.log.output}')

    def assertStillServes(self):
        ours, theirs = self.pair()
        ours.send({'still': 'there'})
        self.assertEqual({'still': 'there'}, theirs.recv(PATIENCE))
        ours.abort()
        theirs.abort()


class Proxy:
    """A TCP proxy between A and B that a test can make evil.

    :param change: called with (data, from_client, offset); returns what is
        passed on, or None to cut both sides
    """

    def __init__(self, port, change):
        self._target = port
        self._change = change
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self):
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        server = socket.create_connection(('127.0.0.1', self._target))
        self._sockets = [client, server]
        for source, sink in ((client, server), (server, client)):
            thread = threading.Thread(
                target=self._pump, args=(source, sink, source is client),
                daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pump(self, source, sink, from_client):
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                changed = self._change(data, from_client, offset)
                offset += len(data)
                if changed is None:
                    self.cut()
                    return
                sink.sendall(changed)
            sink.shutdown(socket.SHUT_WR)

    def cut(self):
        """As if a firewall sent FIN to both: TLS did not say good-bye."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in list(self._threads):
            thread.join(PATIENCE)
        for sock in self._sockets:
            sock.close()
