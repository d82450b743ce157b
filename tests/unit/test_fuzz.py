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

"""What comes from others, in every shape: it is understood, or refused with
an error of ours, and nothing else happens.

Archives have tests of their own: test_archive_properties.
"""

import json
import pathlib
import socket
import struct
import tempfile
import time

import hypothesis
from hypothesis import strategies as st
import testtools

from nova_pycontainer.agent import verbs
from nova_pycontainer.runtime import console_log
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import source
from nova_pycontainer.runtime.migration import sync_preamble
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import spec
from nova_pycontainer.runtime import state

# The same examples in each run: what fails, fails for everybody.
SETTINGS = hypothesis.settings(
    derandomize=True, database=None, deadline=None, max_examples=300,
    suppress_health_check=list(hypothesis.HealthCheck))

_LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
    st.sampled_from([
        '', '/', '..', 'tap0', 'eth0', 'a' * 300, '\0', '\udcff', -1, 1 << 70,
        '00000000-0000-4000-8000-000000000000', 'fa:16:3e:00:00:01']))
_JSON = st.recursive(
    _LEAF, lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=12)


def _like(valid):
    """Objects with the names of a valid one, and other values."""
    return st.one_of(
        _JSON,
        st.dictionaries(st.sampled_from([*valid, 'other']), st.one_of(
            _JSON, st.sampled_from([*valid.values()])), max_size=len(valid)),
        st.tuples(st.sampled_from([*valid]), _JSON).map(
            lambda change: valid | dict([change])))


class _Transport:
    """Gives what has come in pieces of any size."""

    def __init__(self, data, sizes):
        self._data, self._sizes = data, sizes

    def recv_some(self, buffer, deadline):
        size = min(len(buffer), len(self._data),
                   self._sizes.pop(0) if self._sizes else 1 << 20)
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size


class _Stream(_Transport):

    def recv_some(self, buffer, *_):
        return super().recv_some(buffer, 0)

    recv_into = recv_some


_NIC = {'id': '0123456789a-x', 'devname': 'tap0123456789a',
        'mac': 'fa:16:3e:00:00:01', 'mtu': 1500, 'tx_offload': True,
        'inbound': {'average': 1000, 'peak': 2000, 'burst': 1},
        'outbound': None}
_SPEC = {
    'name': 'n', 'hostname': 'h', 'image_id': 'i', 'layer': 'sha256-' +
    '0' * 64, 'nics': [_NIC], 'nesting': False,
    'resources': {'memory_bytes': 64 << 20, 'vcpus': 1, 'disk_bytes': 1 << 30,
                  'cpu_shares': 2, 'cpu_quota_us': 1000, 'pids_max': 64},
    'init': {'argv': ['/sbin/init'], 'env': {}, 'stop_signal': None}}
_HELLO = {
    'v': channel.VERSION, 'role': 'control', 'seq': 0,
    'migration': '00000000-0000-4000-8000-000000000000',
    'instance': '00000000-0000-4000-8000-000000000001'}
_ENDPOINT = {'address': '192.0.2.1', 'port': 1, 'certificate': 'PEM',
             'hostname': 'h'}
_STATE = {'format': state.FORMAT, 'uuid': 'u', 'spec': {}, 'base_id': 1 << 20,
          'disk_method': 'loop', 'created_at': 0.0, 'run': None,
          'exit': {'code': 0}, 'moved': None}


class FuzzTestCase(testtools.TestCase):

    def refused_or(self, kind, function, *arguments):
        try:
            result = function(*arguments)
        except errors.ContainerError as e:
            self.assertIn(e.code, errors.CODES)
            # It goes to a log and into an answer.
            json.dumps(e.to_dict()).encode()
        else:
            self.assertIsInstance(result, kind)

    @SETTINGS
    @hypothesis.given(st.lists(st.one_of(
        st.binary(max_size=40),
        _JSON.map(lambda v: struct.pack('!I', len(json.dumps(v))) +
                  json.dumps(v).encode())), max_size=4),
        st.lists(st.integers(1, 9), max_size=20))
    def test_frames(self, pieces, sizes):
        reader = channel.FrameReader(
            _Transport(b''.join(pieces), sizes), channel.MAX_HELLO)
        for _ in range(len(pieces) + 1):
            try:
                frame = reader.read(time.monotonic() + 60)
            except errors.ContainerError as e:
                self.assertIn(e.code, ('invalid', 'network'))
                return
            if frame is None:
                return
            self.assertIsInstance(frame, dict)

    @SETTINGS
    @hypothesis.given(_like(_HELLO))
    def test_hello(self, frame):
        # What is no object is refused before.
        if isinstance(frame, dict):
            self.refused_or(
                channel.Hello, channel.Hello.from_frame, frame)

    @SETTINGS
    @hypothesis.given(st.sampled_from([*verbs.VERBS]), _JSON, st.data())
    def test_verbs(self, name, anything, data):
        self.refused_or(dict, verbs.check, name, anything)
        some = data.draw(st.dictionaries(st.sampled_from(
            [p.rstrip('?') for p in verbs.VERBS[name].properties] + ['x']),
            _JSON, max_size=5))
        self.refused_or(dict, verbs.check, name, some)

    @SETTINGS
    @hypothesis.given(_like(_SPEC), _like(_SPEC['resources']),
                      _like(_SPEC['init']))
    def test_specification(self, whole, resources, init):
        for data in (whole, _SPEC | {'resources': resources},
                     _SPEC | {'init': init}):
            if isinstance(data, dict):
                self.refused_or(spec.Spec, spec.Spec.from_dict, data)

    @SETTINGS
    @hypothesis.given(_like(_NIC))
    def test_interface(self, data):
        self.refused_or(network.Nic, network.Nic.from_dict, data)

    @SETTINGS
    @hypothesis.given(_like(protocol.Options().to_dict()), _like(_ENDPOINT))
    def test_what_a_migration_is_told(self, options, endpoint):
        if isinstance(options, dict):
            self.refused_or(
                protocol.Options, protocol.Options.from_dict, options)
        if isinstance(endpoint, dict):
            self.refused_or(
                source.Endpoint, source.Endpoint.from_dict, endpoint)
            self.refused_or(type(None), versions.check, endpoint, 'source')

    @SETTINGS
    @hypothesis.given(st.one_of(
        st.binary(max_size=60), _like(_STATE).map(
            lambda data: json.dumps(data).encode())))
    def test_state(self, content):
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            (directory / 'state.json').write_bytes(content)
            self.refused_or(state.State, state.State.load, directory)

    @SETTINGS
    @hypothesis.given(st.one_of(_JSON, st.binary(max_size=60).map(
        lambda data: console_log._encode(data))), st.integers(0, 40))
    def test_log(self, packed, limit):
        with tempfile.TemporaryDirectory() as name:
            path = pathlib.Path(name) / 'console.log'
            self.refused_or(
                type(None), console_log.unpack, path, packed, limit)
            self.assertLessEqual(
                len(console_log.read(path, 1 << 20)), max(limit, 2))

    @SETTINGS
    @hypothesis.given(st.lists(st.one_of(
        st.binary(max_size=30),
        st.builds(lambda *parts: b' '.join(parts) + b'\0', *[
            st.sampled_from([b'f', b'd', b'end', b'0', b'1', b'all', b'x',
                             b'-1', b'nan', b'1.5', b'../a', b''])] * 6),
    ), max_size=6))
    def test_preamble(self, pieces):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.sendall(b''.join(pieces))
            self.refused_or(
                sync_preamble.Preamble, sync_preamble.Preamble.read, ours,
                time.monotonic() + 60, 60)

    @SETTINGS
    @hypothesis.given(st.lists(st.one_of(
        st.binary(max_size=30),
        st.tuples(
            st.sampled_from([b'a.img', b'../b', b'.c', b'/d', b'a\0', b'\xff',
                             b'', b'e' * 300]),
            st.sampled_from([0, 1, 1 << 20, (1 << 63) - 1, (1 << 64) - 1]),
            st.sampled_from([0, 3, images._WHOLE, images._GIVEN_UP])).map(
                lambda piece: images._HEADER.pack(
                    len(piece[0]), *piece[1:]) + piece[0] + b'123')),
        max_size=5))
    def test_images(self, pieces):
        with tempfile.TemporaryDirectory() as name:
            top = pathlib.Path(name)
            (top / 'in').mkdir()
            self.refused_or(
                (int, type(None)), images.receive, top / 'in',
                _Stream(b''.join(pieces), []))
            self.assertEqual([top / 'in'], [*top.iterdir()])
