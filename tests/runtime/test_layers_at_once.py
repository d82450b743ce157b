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

"""Importing in several threads and processes at once, and kill -9."""

import json
import os
import signal
import subprocess
import sys

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from tests.runtime import layers_base
from tests import tarballs

BASE = layers_base.BASE
PATIENCE = layers_base.PATIENCE
fields = layers_base.fields
wait_for = layers_base.wait_for
IMPORTER = """
import json, pathlib, sys, threading
from nova_pycontainer.runtime import layers
directory, image, key, base = sys.argv[1:]
store = layers.LayerStore(pathlib.Path(directory), unpack_base=int(base))
reads = []
def run():
    with open(image, 'rb') as f:
        info = store.import_layer(key, f, image='an image')
        reads.append(f.tell() > 0)
print('ready', flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(reads))
"""

FEEDER = """
import pathlib, sys
from nova_pycontainer.runtime import layers
directory, key, base = sys.argv[1:]
store = layers.LayerStore(pathlib.Path(directory), unpack_base=int(base))
store.import_layer(key, iter(lambda: sys.stdin.buffer.read1(), b''),
                   image='an image')
"""


class TestAtOnce(layers_base.Case):

    def start(self, script, *arguments):
        process = subprocess.Popen(
            [sys.executable, '-c', script, self.layers, *arguments,
             str(BASE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

        def end():
            if process.poll() is None:
                process.kill()
            process.communicate()

        self.addCleanup(end)
        return process

    def test_two_threads_of_two_processes_unpack_once(self):
        image = self.base / 'image'
        tar = tarballs.system()
        for i in range(200):
            tar.add(f'f{i}', tarballs.NOISE)
        image.write_bytes(tarballs.zstd(tar.bytes()))
        key = self.key()
        processes = [self.start(IMPORTER, image, key) for _ in range(2)]
        for process in processes:
            self.assertEqual(b'ready\n', process.stdout.readline())
        for process in processes:
            process.stdin.write(b'\n')
            process.stdin.flush()
        reads = []
        for process in processes:
            reads += json.loads(process.communicate(timeout=PATIENCE)[0])
        self.assertEqual([False, False, False, True], sorted(reads))
        self.assertEqual([key], [i.key for i in self.store.list()])
        self.assertEqual(210, self.store.get(key).entries)

    def test_killed_importer(self):
        key = self.key()
        data = tarballs.system().add('f', tarballs.NOISE).bytes()
        process = self.start(FEEDER, key)
        process.stdin.write(data[:50_000])
        process.stdin.flush()
        wait_for(lambda: list(self.layers.glob('.staging/*/root/f')),
                 'the first files')
        worker = self.worker()
        process.kill()
        process.wait()
        wait_for(lambda: fields(worker).get('State', 'Z')[0] == 'Z',
                 'the process that unpacks to end')
        self.assertEqual(1, len(os.listdir(self.layers / '.staging')))
        self.assertIsNone(self.store.get(key))
        self.store.recover()
        self.check_nothing_is_left()
        self.load(data, key=key)

    def test_next_import_cleans_up_after_a_killed_one(self):
        key = self.key()
        left = self.layers / '.staging' / f'{key}.0123'
        (left / 'root/sub').mkdir(parents=True)
        other = self.layers / '.staging' / f'{self.key()}.4567'
        other.mkdir()
        self.load(tarballs.system().bytes(), key=key)
        self.assertEqual([other.name], os.listdir(self.layers / '.staging'))
        self.store.recover()

    def test_recover_leaves_a_living_import_alone(self):
        with self.half_way() as result:
            self.make_store().recover()
            self.assertEqual(1, len(os.listdir(self.layers / '.staging')))
        self.assertIsInstance(result[0], layers.LayerInfo)

    def test_other_keys_do_not_wait(self):
        with self.half_way():
            self.load(tarballs.system().bytes())

    def test_waiting_has_an_end(self):
        key = self.key()
        with self.half_way(key=key):
            store = self.make_store(timeout=0.2)
            error = self.assertRaises(
                errors.ContainerError, self.load, b'', store=store, key=key)
            self.assertEqual('timeout', error.code)
            error = self.assertRaises(
                errors.ContainerError, store.delete, key)
            self.assertEqual('timeout', error.code)

    def test_killed_worker(self):
        with self.half_way() as result:
            os.kill(self.worker(), signal.SIGKILL)
        self.assertEqual('internal', result[0].code)
        self.assertIn('exit code 137', str(result[0]))
        self.check_nothing_is_left()

    def test_killed_supervisor(self):
        with self.half_way() as result:
            worker = self.worker()
            os.kill(int(fields(worker)['PPid']), signal.SIGKILL)
            wait_for(lambda: fields(worker).get('State', 'Z')[0] == 'Z',
                     'the process that unpacks to end')
        self.assertEqual('internal', result[0].code)
        self.check_nothing_is_left()
