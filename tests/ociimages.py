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

"""Archives of container layers, as others may save them."""

import gzip
import hashlib
import io
import json
import platform
import tarfile

import zstandard

from tests import tarballs

OCI = 'application/vnd.oci.image.'
DOCKER = 'application/vnd.docker.'
INDEX = f'{OCI}index.v1+json'
MANIFEST = f'{OCI}manifest.v1+json'
CONFIG = f'{OCI}config.v1+json'
ARCHITECTURE = {'x86_64': 'amd64', 'aarch64': 'arm64'}[platform.machine()]
HERE = {'os': 'linux', 'architecture': ARCHITECTURE}
ELSEWHERE = {'os': 'linux', 'architecture': 's390x'}
#: Ending of a layer's media type → what packs it.
PACKERS = {
    'tar': lambda data: data,
    'tar+gzip': lambda data: gzip.compress(data, 1),
    'tar+zstd': tarballs.zstd,
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI image layout, as it is told, however wrong that may be."""

    def __init__(self):
        self.files = {'oci-layout': b'{"imageLayoutVersion": "1.0.0"}'}
        #: Of the last image, as they are in their descriptors' blobs.
        self.manifest = self.config = None

    def blob(self, data, media, algorithm='sha256', **more):
        """Return the descriptor of new data."""
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        value = hashlib.new(algorithm, data).hexdigest()
        self.files[f'blobs/{algorithm}/{value}'] = data
        return {'mediaType': media, 'digest': f'{algorithm}:{value}',
                'size': len(data)} | more

    def image(self, layers, *, packer='tar+gzip', on=HERE, config=None,
              manifest=None, change=lambda layers: None, **more):
        """Return the descriptor of a new image's manifest.

        :param layers: tar archives
        :param more: of the descriptor
        """
        blobs = [self.blob(PACKERS[packer](data), f'{OCI}layer.v1.{packer}')
                 for data in layers]
        change(blobs)
        self.config = on | {
            'config': {'Cmd': ['/bin/app']}, 'rootfs': {
                'type': 'layers', 'diff_ids': [
                    f'sha256:{sha256(data)}' for data in layers]}
        } | (config or {})
        self.manifest = {
            'schemaVersion': 2, 'mediaType': MANIFEST,
            'config': self.blob(self.config, CONFIG), 'layers': blobs
        } | (manifest or {})
        return self.blob(self.manifest, MANIFEST, **more)

    def nest(self, *manifests, **more):
        """Return the descriptor of a new index."""
        return self.blob({'schemaVersion': 2, 'manifests': manifests},
                         INDEX, **more)

    def top(self, *manifests, **more):
        """Write index.json."""
        self.files['index.json'] = json.dumps(
            {'schemaVersion': 2, 'manifests': manifests} | more).encode()
        return self

    def bytes(self, reverse=False):
        return pack(self.files, reverse)


def pack(files, reverse=False):
    """Return a tar archive of files; None is a directory, text a link."""
    tar = tarballs.Tar()
    for name, data in sorted(files.items(), reverse=reverse):
        if data is None:
            tar.dir(name)
        elif isinstance(data, str):
            tar.symlink(name, data)
        else:
            tar.add(name, data)
    return tar.bytes()


def oci(*layers, **more):
    """Return an OCI archive with one image.

    :param layers: :class:`tarballs.Tar`, or a tar archive
    """
    layout = Layout()
    return layout.top(layout.image(
        [layer.bytes() if isinstance(layer, tarballs.Tar) else layer
         for layer in layers], **more)).bytes()


def docker_files(*layers, style='podman', packer='tar', on=HERE,
                 config=None):
    """Return the files of a Docker archive with one image.

    :param style: ``old`` has a directory for each layer, ``podman`` links in
        them
    """
    layers = [layer.bytes() if isinstance(layer, tarballs.Tar) else layer
              for layer in layers]
    data = json.dumps(on | {'config': {'Cmd': ['/bin/app']}, 'rootfs': {
        'type': 'layers', 'diff_ids': [
            f'sha256:{sha256(layer)}' for layer in layers]}
    } | (config or {})).encode()
    name = f'{sha256(data)}.json'
    files = {name: data, 'repositories': b'{}'}
    paths = []
    for number, layer in enumerate(layers):
        content = PACKERS[packer](layer)
        directory = sha256(b'%d' % number)
        files[f'{directory}/VERSION'] = b'1.0'
        paths.append(f'{directory}/layer.tar')
        if style == 'old':
            files[paths[-1]] = content
        else:
            blob = f'{sha256(layer)}.tar'
            files[blob] = content
            files[paths[-1]] = f'../{blob}'
            if style == 'podman':
                paths[-1] = blob
    files['manifest.json'] = json.dumps([
        {'Config': name, 'RepoTags': ['system:latest'], 'Layers': paths}
    ]).encode()
    return files


def docker(*layers, **more):
    return pack(docker_files(*layers, **more))


def split_system():
    """The system in three layers, and what each way of change leaves of it.

    :returns: layers; path → content of a file, ``None`` of a directory, or
        text of a link
    """
    T = tarballs.Tar
    first = (tarballs.system()
             .add('kept', b'first').add('gone', b'x').add('changed', b'old')
             .dir('removed').add('removed/file', b'x')
             .dir('opaque', pax={'SCHILY.xattr.user.a': '1'})
             .add('opaque/old', b'x').dir('opaque/deep')
             .add('opaque/deep/old', b'x')
             .dir('to-file').add('to-file/x', b'x')
             .dir('to-link').add('to-link/x', b'x')
             .add('to-dir', b'x').symlink('link-to-dir', 'kept')
             .symlink('hidden-link', 'kept')
             .add('linked', b'twice').dir('dev').add('dev/left', b'x'))
    second = (T().add('.wh.gone').add('.wh.removed').add('.wh.hidden-link')
              .add('.wh.never').add('never/.wh.never')
              .add('opaque/new', b'new').add('opaque/deep/new', b'new')
              # Of what is lower only, though it stands behind.
              .dir('opaque', mode=0o700).add('opaque/.wh..wh..opq')
              .add('changed', b'new').add('to-file', b'file')
              .symlink('to-link', 'usr').dir('to-dir').add('to-dir/x', b'y')
              .dir('link-to-dir').link('second-name', 'linked')
              .add('replaced', b'once').link('also', 'replaced')
              .add('.wh..wh.aufs').dir('.wh..wh.plnk')
              .add('.wh..wh.plnk/1.2', b'x').device('dev/left'))
    third = (T().add('.wh.linked').add('removed', b'a file now')
             .add('replaced', b'twice').add('to-link/through', b'link')
             .add('to-dir/.wh.x').add('back', b'x'))
    fourth = T().dir('./', mode=0o711).add('gone', b'again').add('.wh.back')
    tree = {
        'kept': b'first', 'changed': b'new', 'removed': b'a file now',
        'opaque': None, 'opaque/new': b'new', 'opaque/deep': None,
        'opaque/deep/new': b'new', 'to-file': b'file', 'to-link': 'usr',
        'usr/through': b'link', 'to-dir': None, 'link-to-dir': None,
        'second-name': b'twice', 'replaced': b'twice', 'also': b'once',
        'gone': b'again', 'dev': None,
        'etc': None, 'usr': None, 'usr/bin': None, 'usr/sbin': None,
        'bin': 'usr/bin', 'sbin': 'usr/sbin',
        'etc/os-release': b'ID=test\nVERSION_ID="1.0"\n',
        'usr/sbin/init': ..., 'usr/bin/sh': ...}
    return [first, second, third, fourth], tree


def split_busybox(data):
    """Return a bootable system in three layers that all have to be applied.

    :param data: the root tarball of tools/images' busybox
    """
    with zstandard.open(io.BytesIO(data)) as stream:
        data = stream.read()
    layers = [tarballs.Tar(uid=0, gid=0) for _ in range(3)]
    first, second, third = layers
    # What nothing starts with.
    (first.add('sbin', b'a file').symlink('var', '/tmp')
     .dir('junk').add('junk/file', tarballs.NOISE).add('etc/inittab', b'junk')
     .add('etc/junk', b'x'))
    second.dir('sbin').add('.wh.junk')
    third.dir('etc').add('etc/.wh..wh..opq').dir('var')
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            name = member.name.removeprefix('./')
            top = name.partition('/')[0]
            content = tar.extractfile(member).read() if (
                member.isreg()) else b''
            layer = (third if top in ('etc', 'var') else
                     second if top == 'sbin' else first)
            if name == 'bin/sh':
                second.link(name, 'bin/busybox')
                continue
            layer.add(member.name, content, kind=member.type,
                      mode=member.mode, link=member.linkname,
                      mtime=member.mtime)
    return layers
