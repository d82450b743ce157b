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

"""What the process that unpacks can reach, and what is believed of it."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import ddt

from nova_pycontainer.runtime import sandbox
from tests.runtime import layers_base
from tests import tarballs

BASE = layers_base.BASE
PATIENCE = layers_base.PATIENCE
fields = layers_base.fields


@ddt.ddt
class TestUntrustedAnswers(layers_base.Case):
    """The worker has read the image: what it says is not trusted either."""

    def store_with(self, script, timeout=PATIENCE):
        python = self.base / 'python'
        python.write_text(f'#!/bin/sh\n{script}\n')
        python.chmod(0o755)
        return self.make_store(python=str(python), timeout=timeout)

    @ddt.data(
        'cat >/dev/null', 'exit 0', 'kill -9 $$', 'echo "{}"',
        'cat >/dev/null; echo \'{"ok": true}\'',
        'cat >/dev/null; echo \'{"ok": true, "entries": 1, "bytes": -1, '
        '"notes": {}}\'',
        'cat >/dev/null; echo \'{"ok": true, "entries": 1e9, "bytes": 1, '
        '"notes": {}}\'',
        'cat >/dev/null; echo \'{"ok": true, "entries": 1, "bytes": 1, '
        '"notes": {}}\'; exit 1',
        'echo \'{"ok": false, "error": {"code": "layer_in_use", '
        '"message": "x"}}\'; exit 1',
        'head -c 10000000 /dev/zero', 'head -c 10000000 /dev/zero >&2',
        'yes "["  | head -c 60000 | tr -d "\\n"')
    def test_failure(self, script):
        self.refuse('internal', 'process that unpacks', tarballs.NOISE,
                    store=self.store_with(script))

    def test_text_is_cleaned(self):
        store = self.store_with(
            'printf \'{"ok": false, "error": {"code": "image_truncated", '
            '"message": "\\\\u001b[2J\\\\n%5000s"}}\' x; exit 1')
        error = self.refuse('image_truncated', '', tarballs.NOISE,
                            store=store)
        self.assertTrue(str(error).isprintable())
        self.assertLess(len(str(error)), 1500)

    def test_process_that_hangs(self):
        self.refuse('timeout', 'too long', tarballs.NOISE * 20,
                    store=self.store_with('exec sleep 1000', 1.0))


HOSTILE = """
import ctypes, json, os, pathlib, resource, socket, stat, sys
from nova_pycontainer.runtime import sandbox
from nova_pycontainer.runtime import syscalls

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)

def script():
    fd = os.open('x', os.O_WRONLY | os.O_CREAT, 0o755)
    os.write(fd, b'#!/x')
    os.close(fd)
    os.execv('/x', ['x'])

def through_a_link():
    os.symlink('x', 'l')
    return os.open('l', os.O_RDONLY)

def attributes():
    return os.setxattr('/', 'trusted.x', b'')

def directory(path):
    return lambda: os.listdir(path)

def network(family, address):
    return lambda: socket.socket(family, socket.SOCK_STREAM).connect(address)

ATTEMPTS = {
    'host file': lambda: os.open('/etc/passwd', os.O_RDONLY),
    'upwards': directory('../../../../..'),
    'proc': directory('/proc'),
    'device': lambda: os.mknod('d', stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    'chroot': lambda: os.chroot('/'),
    'mount': lambda: call('mount', b'x', b'/', b'tmpfs', 0, None),
    'umount': lambda: syscalls.umount('/', syscalls.MNT_DETACH),
    'mount namespace': lambda: syscalls.unshare(syscalls.CLONE_NEWNS),
    'user namespace': lambda: syscalls.unshare(syscalls.CLONE_NEWUSER),
    'other user': lambda: os.setresuid(1, 1, 1),
    'groups': lambda: os.setgroups([0]),
    'process': lambda: os.fork(),
    'program': script,
    'link': through_a_link,
    'trusted attribute': attributes,
    'host name': lambda: socket.sethostname('x'),
    'network': network(socket.AF_INET, ('127.0.0.1', 22)),
    'signal': lambda: os.kill(-1, 9),
    'parent': lambda: os.kill(int(sys.argv[3]), 9),
    'more files': lambda: resource.setrlimit(
        resource.RLIMIT_NOFILE, (1000, 1000)),
    'large file': lambda: os.truncate('x', 1 << 30),
}

def work():
    result = {}
    for name, attempt in ATTEMPTS.items():
        try:
            result[name] = attempt() or 'done'
        except OSError as e:
            result[name] = e.errno
        except ValueError as e:
            result[name] = str(e)
    result['pid'] = os.getpid(), os.getppid()
    result['ids'] = os.getresuid(), os.getresgid(), os.getgroups()
    result['host name is'] = os.uname().nodename
    result['descriptors'] = []
    for fd in range(64):
        try:
            os.fstat(fd)
            result['descriptors'].append(fd)
        except OSError:
            pass
    os.write(1, json.dumps(result).encode())
    return 7

sys.exit(sandbox.run(
    pathlib.Path(sys.argv[1]), int(sys.argv[2]),
    {resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: 64,
     resource.RLIMIT_FSIZE: 1 << 20}, work))
"""


class TestSandbox(layers_base.Case):

    def test_what_the_kernel_says_of_the_worker(self):
        with self.half_way():
            pid = self.worker()
            proc = pathlib.Path(f'/proc/{pid}')
            status = fields(pid)
            for name in ('Uid', 'Gid'):
                self.assertEqual({str(BASE)}, set(status[name].split()))
            self.assertEqual('', status['Groups'])
            self.assertEqual('1', status['NoNewPrivs'])
            allowed = sum(1 << n for n in sandbox.CAPABILITIES.values())
            for name in ('CapPrm', 'CapEff', 'CapBnd'):
                self.assertEqual(allowed, int(status[name], 16), name)
            self.assertEqual('1', status['NSpid'].split()[-1])
            for name in ('uid_map', 'gid_map'):
                self.assertEqual(['0', str(BASE), '65536'],
                                 (proc / name).read_text().split())
            for name in ('user', 'mnt', 'net', 'ipc', 'uts', 'pid',
                         'cgroup'):
                self.assertNotEqual(os.readlink(f'/proc/self/ns/{name}'),
                                    os.readlink(proc / 'ns' / name), name)
            mounts = (proc / 'mountinfo').read_text().splitlines()
            self.assertEqual(1, len(mounts), mounts)
            options = set(mounts[0].split()[5].split(','))
            self.assertTrue({'nosuid', 'nodev', 'noexec', 'nosymfollow',
                             'idmapped'} <= options, options)
            # The stream, two outputs, its root; and what it unpacks, until
            # it has to wait for more.
            layers_base.wait_for(
                lambda: len(os.listdir(proc / 'fd')) == 4,
                'four descriptors')
            staged, = self.layers.glob('.staging/*/root')
            layers_base.wait_for(
                lambda: os.listdir(staged) == os.listdir(proc / 'root'),
                'the root to be what is staged')
            limits = (proc / 'limits').read_text()
            self.assertRegex(limits, r'Max processes +0 +0')
            self.assertRegex(limits, r'Max open files +64 +64')
            self.assertRegex(limits, r'Max address space +1073741824')

    def test_what_a_hostile_worker_gets(self):
        directory = self.base / 'root'
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, '-c', HOSTILE, directory, str(BASE),
             str(os.getpid())], stdout=subprocess.PIPE, timeout=PATIENCE,
            cwd='/')
        self.assertEqual(7, done.returncode)
        got = json.loads(done.stdout)
        self.assertEqual([1, 0], got.pop('pid'))
        self.assertEqual([[0] * 3, [0] * 3, []], got.pop('ids'))
        self.assertEqual([0, 1, 2], got.pop('descriptors'))
        self.assertEqual(os.uname().nodename, got.pop('host name is'))
        self.assertEqual({
            'host file': errno.ENOENT,
            'upwards': 'done',  # its own root, still empty
            'proc': errno.ENOENT,
            'device': errno.EPERM,
            'chroot': errno.EPERM,
            'mount': errno.EPERM,
            'umount': errno.EPERM,
            'mount namespace': errno.EPERM,
            'user namespace': errno.ENOSPC,
            'other user': errno.EPERM,
            'groups': errno.EPERM,
            'process': errno.EAGAIN,
            'program': errno.EACCES,
            'link': errno.ELOOP,
            'trusted attribute': errno.EPERM,
            'host name': errno.EPERM,
            'network': errno.ENETUNREACH,
            'signal': errno.ESRCH,
            'parent': errno.ESRCH,
            'more files': 'not allowed to raise maximum limit',
            'large file': errno.EFBIG,
        }, got)
        self.assertEqual(['l', 'x'], sorted(os.listdir(directory)))

    def test_directory_that_is_not_empty(self):
        directory = self.base / 'root'
        (directory / 'sub').mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, '-c', HOSTILE, directory, str(BASE), '1'],
            capture_output=True, timeout=PATIENCE)
        self.assertEqual((1, b''), (done.returncode, done.stdout))
        self.assertIn(b'not empty', done.stderr)
