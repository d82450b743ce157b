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

"""A layer store of its own for each test, and a look at what is left of it."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
import uuid

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from tests import cases
from tests import leaks
from tests import tarballs

WORK = pathlib.Path(os.environ.get(
    'NOVA_PYCONTAINER_WORK', '/var/tmp/nova-pycontainer'))
#: Ends a test that hangs; nothing is measured by it.
PATIENCE = 120.0
MIB = 1 << 20
#: Ids above those that the runtime's own tests use.
BASE = 0x70000000


def wait_for(condition, what):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f'waited {PATIENCE:g} s in vain for {what}')


def fields(pid):
    """/proc/PID/status as a dictionary, or {} if there is no such process."""
    try:
        text = pathlib.Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return {}
    return {k: v.strip() for k, v in
            (line.split(':', 1) for line in text.splitlines())}


class Case(cases.TestCase):

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('the sandbox is set up by root; run '
                          'tools/run_tests.sh')
        self.marker = f'layers-test-{uuid.uuid4().hex[:12]}'
        check = leaks.LeakCheck(self.marker)
        check.setUp()
        self.addCleanup(check.cleanUp)
        self.base = pathlib.Path(tempfile.mkdtemp(
            prefix=f'{self.marker}-', dir=WORK if WORK.is_dir() else None))
        self.addCleanup(shutil.rmtree, self.base)
        self.base.chmod(0o711)
        self.layers = self.base / 'layers'
        self.used = set()
        self.store = self.make_store()
        self.addCleanup(self.check_nothing_is_left)

    def make_store(self, *, min_free_bytes=0, directory=None, **kw):
        limits = {k: kw.pop(k) for k in list(kw)
                  if k in archive.Limits.__dataclass_fields__}
        return layers.LayerStore(
            directory or self.layers, unpack_base=BASE,
            in_use=lambda: self.used, limits=archive.Limits(
                min_free_bytes=min_free_bytes, **limits), **kw)

    def check_nothing_is_left(self):
        for name in ('.staging', '.locks'):
            self.assertEqual([], os.listdir(self.layers / name), name)

    @staticmethod
    def key():
        return 'sha512-' + uuid.uuid4().hex

    def load(self, data, *, store=None, key=None, **kw):
        chunks = [data] if isinstance(data, bytes) else data
        return (store or self.store).import_layer(
            key or self.key(), chunks, image='an image', **kw)

    def refuse(self, code, text, data, **kw):
        key = self.key()
        error = self.assertRaises(
            errors.ContainerError, self.load, data, key=key, **kw)
        self.assertEqual(
            (code, True), (error.code, bool(re.search(text, str(error)))),
            str(error))
        self.assertIn("'an image'", str(error))
        self.assertIsNone((kw.get('store') or self.store).get(key))
        self.check_nothing_is_left()
        return error

    def worker(self):
        """The pid of the process in the sandbox, once it is in there."""

        def look():
            for process in leaks.take().processes.values():
                if self.marker not in process.command:
                    continue
                status = fields(process.pid)
                if status.get('NSpid', '').endswith('\t1') and (
                        status['Uid'].split()[0] == str(BASE)):
                    return process.pid
            return None

        return wait_for(look, 'the process that unpacks')

    @contextlib.contextmanager
    def half_way(self, store=None, key=None):
        """An import that has unpacked a part and waits for the rest."""
        go = threading.Event()
        data = tarballs.system().add('late', b'x').bytes()
        result = []

        def chunks():
            yield data[:-12_000]
            go.wait(PATIENCE)
            yield data[-12_000:]

        def run():
            try:
                result.append(self.load(chunks(), store=store, key=key))
            except errors.ContainerError as e:
                result.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for(lambda: list(self.layers.glob(
                '.staging/*/root/etc/os-release')), 'the first files')
            yield result
        finally:
            go.set()
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive())
