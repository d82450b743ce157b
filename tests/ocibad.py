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

"""Archives of container layers that are wrong, and what is said of them."""

import json
import tarfile

from tests import ociimages
from tests import tarballs

HERE, ELSEWHERE = ociimages.HERE, ociimages.ELSEWHERE
OCI, DOCKER = ociimages.OCI, ociimages.DOCKER
Layout, pack, oci = ociimages.Layout, ociimages.pack, ociimages.oci
docker, docker_files = ociimages.docker, ociimages.docker_files
sha256 = ociimages.sha256

_SYSTEM = tarballs.system().bytes()


def _layout(function):
    layout = Layout()
    function(layout)
    return layout.bytes()


def _edited(name, edit):
    """A sound archive with other text in one of its files."""
    layout = Layout()
    layout.top(layout.image([_SYSTEM]))
    value = edit(json.loads(layout.files[name]))
    layout.files[name] = value if isinstance(
        value, bytes) else json.dumps(value).encode()
    return layout.bytes()


def _blobs(edit):
    """A sound archive with other descriptors of its layers."""
    return oci(_SYSTEM, change=edit)


def _change_layer(**values):
    return _blobs(lambda blobs: blobs[0].update(values))


def _manifest(**values):
    """A sound archive with another descriptor of its manifest."""
    layout = Layout()
    return layout.top(layout.image([_SYSTEM]) | values).bytes()


def _nested(count):
    layout = Layout()
    top = layout.image([_SYSTEM])
    for _ in range(count):
        top = layout.nest(top)
    return layout.top(top).bytes()


def _crowd(count):
    layout = Layout()
    return layout.top(*[layout.nest(
        {'mediaType': 'x', 'digest': f'sha256:{n:064x}', 'size': 1}
    ) for n in range(count)]).bytes()


def _without(wanted):
    """A sound archive without one of its blobs."""
    layout = Layout()
    top = layout.top(layout.image([_SYSTEM]))
    digest = {'layer': layout.manifest['layers'][0]['digest'],
              'config': layout.manifest['config']['digest'],
              'manifest': json.loads(layout.files['index.json'])[
                  'manifests'][0]['digest']}[wanted]
    del layout.files[f'blobs/{digest.replace(":", "/")}']
    return top.bytes()


def _damaged(wanted, edit):
    """A sound archive with one of its blobs changed."""
    layout = Layout()
    layout.top(layout.image([_SYSTEM], packer='tar'))
    digest = (layout.manifest['layers'][0] if wanted == 'layer' else
              layout.manifest['config'])['digest']
    path = f'blobs/{digest.replace(":", "/")}'
    layout.files[path] = edit(layout.files[path])
    return layout.bytes()


def _linked(**links):
    """A sound archive with links in place of its files."""
    layout = Layout()
    layout.top(layout.image([_SYSTEM]))
    layout.files = {name: data for name, data in layout.files.items()
                    if name.split('/')[0] not in links} | links
    return layout.bytes()


def _two(*on):
    layout = Layout()
    return layout.top(*[
        layout.image([_SYSTEM], config={'author': str(n)}, on=platform)
        for n, platform in enumerate(on)]).bytes()


def _docker(edit, **more):
    """A sound Docker archive with something changed in its manifest."""
    files = docker_files(_SYSTEM, **more)
    value = json.loads(files['manifest.json'])
    value = edit(value) or value
    files['manifest.json'] = json.dumps(value).encode()
    return pack(files)


def _docker_file(name, data):
    files = docker_files(_SYSTEM)
    files[next(found for found in files if found.endswith(name))] = data
    return pack(files)


def _second(tar):
    return oci(_SYSTEM, tar)


_T = tarballs.Tar
_CUT, _NO, _UNSAFE = (
    'image_truncated', 'image_unsupported', 'image_unsafe_entry')

#: Name: image, error code, what the message has to say.
BAD = {
    # Which image
    'several in one index': (_two(HERE, HERE), _NO, '2 images for linux'),
    'several in a Docker archive': (
        _docker(lambda images: images * 2), _NO, '2 images.*one image'),
    'none in a Docker archive': (_docker(lambda images: images.clear()),
                                 _NO, 'no images'),
    'none in an index': (Layout().top().bytes(), _NO, 'no image of a file'),
    'another architecture': (
        oci(_SYSTEM, on=ELSEWHERE), 'image_wrong_arch',
        'not for linux/a.*linux/s390x.*hw_architecture'),
    'other architectures in an index': (
        _two(ELSEWHERE, HERE | {'os': 'windows'}), 'image_wrong_arch',
        'linux/s390x, windows/'),
    'another variant': (
        oci(_SYSTEM, on=HERE | {'variant': 'v99'}), 'image_wrong_arch',
        'v99'),
    'another architecture of Docker': (
        docker(_SYSTEM, on=ELSEWHERE), 'image_wrong_arch', 's390x'),
    'no platform': (
        oci(_SYSTEM, on={}), 'image_wrong_arch', 'no platform'),
    'platform of the descriptor': (
        _manifest(platform=ELSEWHERE), 'image_wrong_arch', 's390x'),
    'no image but something else': (
        oci(_SYSTEM, manifest={'config': Layout().blob(
            b'{}', 'application/vnd.oci.empty.v1+json')}),
        _NO, 'no image of a file.*empty'),
    'unknown things in an index': (
        _manifest(mediaType='text/plain'), _NO, 'no image.*text/plain'),
    # Layers
    'layer that is elsewhere': (
        _change_layer(urls=['https://example.org']), _NO, 'foreign'),
    'nondistributable layer': (
        _change_layer(
            mediaType=f'{OCI}layer.nondistributable.v1.tar+gzip'),
        _NO, 'foreign'),
    'foreign layer': (
        _change_layer(
            mediaType=f'{DOCKER}image.rootfs.foreign.diff.tar.gzip'),
        _NO, 'foreign'),
    'encrypted layer': (
        _change_layer(mediaType=f'{OCI}layer.v1.tar+gzip+encrypted'),
        _NO, 'encrypted'),
    'layer of an unknown type': (
        _change_layer(mediaType=f'{OCI}layer.v1.squashfs'), _NO,
        'unknown media type.*squashfs'),
    'layer that is not of its type': (
        _change_layer(mediaType=f'{OCI}layer.v1.tar+zstd'), _NO,
        'not of its media type.*gzip'),
    'no layers': (oci(), _NO, '0 layers'),
    'layers without entries': (
        oci(bytes(1024), bytes(10240)), 'image_not_archive', 'no entries'),
    'layer that is no tar archive': (
        oci(b'x' * 2048), 'image_not_archive',
        'layer 1 of 1.*no known format'),
    'layer that is a disk image': (
        oci(tarballs.BAD['qcow2'][0]), 'image_is_disk', 'qcow2'),
    'layer that is cut off': (
        oci(_SYSTEM[:-10_240]), _CUT, 'layer 1 of 1.*end mark'),
    # Missing, other and too much data
    'missing layer': (_without('layer'), _CUT, 'no file'),
    'missing config': (_without('config'), _CUT, 'no file'),
    'missing manifest': (_without('manifest'), _CUT, 'no file'),
    'missing index': (Layout().bytes(), _CUT, "'index.json'"),
    'damaged layer': (
        _damaged('layer', lambda data: b'X' + data[1:]), _CUT,
        'layer 1 of 1.*another digest'),
    'longer layer': (
        _damaged('layer', lambda data: data + bytes(512)), _CUT,
        'bytes, and should have'),
    'damaged config': (
        _damaged('config', lambda data: data.replace(b'app', b'apq')), _CUT,
        'another digest'),
    'size that is a lie': (_change_layer(size=7), _CUT, 'should have 7'),
    'size of the manifest that is a lie': (
        _manifest(size=7), _CUT, 'should have 7'),
    'size below nothing': (_change_layer(size=-1), _NO, 'no size'),
    'size that is true': (_change_layer(size=True), _NO, 'no size'),
    'huge manifest': (
        _manifest(size=1 << 40), 'image_too_large', 'metadata'),
    'huge index': (
        _edited('index.json', lambda index: json.dumps(
            index).encode() + b' ' * (4 << 20)), 'image_too_large', 'index'),
    'other digest of the archive in a layer': (
        oci(_SYSTEM, config={'rootfs': {
            'diff_ids': [f'sha256:{"0" * 64}']}}), _CUT,
        'sha256:000000000000 has another'),
    'other digest in a Docker archive': (
        docker(_SYSTEM, config={'rootfs': {
            'diff_ids': [f'sha256:{"0" * 64}']}}), _CUT, 'another digest'),
    'fewer digests than layers': (
        oci(_SYSTEM, config={'rootfs': {'diff_ids': []}}), _NO,
        '0 layers, and the manifest 1'),
    'no rootfs': (oci(_SYSTEM, config={'rootfs': None}), _NO, 'diff_ids'),
    # Documents
    'layout of another version': (
        _edited('oci-layout', lambda _: {'imageLayoutVersion': '2.0.0'}),
        _NO, "'2.0.0'"),
    'index of another version': (
        _edited('index.json', lambda index: index | {'schemaVersion': 1}),
        _NO, 'schema version of index.json is 1'),
    'manifest of another version': (
        oci(_SYSTEM, manifest={'schemaVersion': 1}), _NO,
        'schema version .* 1'),
    'index that is no JSON': (
        _edited('index.json', lambda _: b'{'), _CUT, 'not JSON'),
    'index of nothing but brackets': (
        _edited('index.json', lambda _: b'[' * 100_000), _CUT, 'not JSON'),
    'index that is a list': (
        _edited('index.json', lambda _: []), _NO, 'JSON dict'),
    'index without a list': (
        _edited('index.json', lambda _: {'schemaVersion': 2}), _NO,
        '"manifests"'),
    'index of numbers': (
        _edited('index.json', lambda index: index | {'manifests': [1]}),
        _NO, 'lacks a descriptor'),
    'indexes in indexes': (_nested(6), _NO, 'within one another'),
    'many indexes': (_crowd(300), 'image_too_large', '256 manifests'),
    'Docker manifest without a config': (
        _docker(lambda images: images[0].pop('Config') and None), _NO,
        'Config'),
    'Docker manifest of nonsense': (
        _docker(lambda images: [1]), _NO, 'Config'),
    'Docker manifest with layers that are numbers': (
        _docker(lambda images: images[0].update(Layers=[1])), _NO,
        'no path'),
    'Docker layer that is missing': (
        _docker(lambda images: images[0].update(Layers=['none'])), _CUT,
        "no file 'none'"),
    'Docker config that is not what its name says': (
        _docker_file('.json', b'{}'), _CUT, 'name says'),
    # Paths
    'digest that is a path': (
        _change_layer(digest='sha256:../../oci-layout'), _NO,
        'no digest'),
    'digest that ends with a path': (
        _change_layer(digest=f'sha256:{"0" * 64}/../x'), _NO, 'no digest'),
    'digest of another kind': (
        _change_layer(digest='md5:' + '0' * 32), _NO, 'no digest'),
    'digest that is a list': (
        _change_layer(digest=[]), _NO, 'a list is no digest'),
    'manifest that is a path': (
        _manifest(digest='sha256:../../../etc/passwd'), _NO, 'no digest'),
    'Docker layer outside': (
        _docker(lambda images: images[0].update(Layers=['../evil'])),
        _UNSAFE, 'upwards'),
    'Docker layer with a path from the root': (
        _docker(lambda images: images[0].update(Layers=['/etc/passwd'])),
        _UNSAFE, 'absolute'),
    'Docker layer that links out': (
        _docker_file('.tar', '../../etc/passwd'), _UNSAFE, 'out of the'),
    'Docker layer that links to the root': (
        _docker_file('.tar', '/etc/passwd'), _UNSAFE, 'out of the'),
    'Docker layer that links to nothing': (
        _docker_file('.tar', 'layer.tar'), _CUT, 'no file'),
    'Docker layer that links in a circle': (
        pack(docker_files(_SYSTEM, style='linked') | {
            f'{sha256(_SYSTEM)}.tar': f'{sha256(b"0")}/layer.tar'}), _CUT,
        'no file'),
    'Docker config that is a directory': (
        _docker(lambda images: images[0].update(Config='.')), _CUT,
        'no file'),
    'blobs that are a link': (
        _linked(blobs='../outside'), _CUT, 'no file'),
    'index that is a link': (
        _linked(**{'index.json': '/etc/passwd'}), _CUT, 'no file'),
    # Entries
    'dot dot in a layer': (
        _second(_T().add('../evil', b'x')), _UNSAFE,
        'upwards'),
    'absolute name in a layer': (
        _second(_T().add('/etc/evil', b'x')), _UNSAFE, 'absolute'),
    'dot dot in a whiteout': (
        _second(_T().add('../.wh.evil')), _UNSAFE, 'upwards'),
    'absolute whiteout': (
        _second(_T().add('/etc/.wh.passwd')), _UNSAFE, 'absolute'),
    'whiteout of the directory above': (
        _second(_T().add('etc/.wh...')), _UNSAFE, 'names no file'),
    'whiteout of its own directory': (
        _second(_T().add('etc/.wh..')), _UNSAFE, 'names no file'),
    'whiteout of nothing': (
        _second(_T().add('etc/.wh.')), _UNSAFE, 'names no file'),
    'whiteout that is a directory': (
        _second(_T().dir('.wh.etc')), _UNSAFE, 'cannot be'),
    'whiteout on the way': (
        _second(_T().add('.wh.etc/x')), _UNSAFE, 'cannot be'),
    'whiteout through a link out of the root': (
        oci(_SYSTEM, _T().symlink('out', '../../outside'),
            _T().add('out/.wh.sentinel')), _UNSAFE, 'symbolic link'),
    'opaque directory through a link out of the root': (
        oci(_SYSTEM, _T().symlink('out', '../../outside'),
            _T().add('out/.wh..wh..opq')), _UNSAFE, 'symbolic link'),
    'whiteout through a link of a lower layer': (
        _second(_T().add('bin/.wh.sh')), _UNSAFE, 'symbolic link'),
    'whiteout below a file': (
        _second(_T().add('etc/os-release/.wh.x')), _UNSAFE,
        'not a directory'),
    'write through a link out of the root': (
        oci(_SYSTEM, _T().add('.wh.etc').symlink('etc', '../../outside'),
            _T().add('etc/evil', b'x')), _UNSAFE, 'leads out'),
    'hard link out of the root in a layer': (
        _second(_T().link('h', '../../outside/sentinel')), _UNSAFE,
        'upwards'),
    'hard link to what is hidden': (
        _second(_T().add('etc/.wh.os-release')
                .link('h', 'etc/os-release')), _UNSAFE, 'not in the archive'),
    'link over a directory of the same layer': (
        _second(_T().dir('d').symlink('d', '/tmp')), _UNSAFE,
        'replace a directory'),
    'root of a layer as a file': (
        _second(_T().add('.', b'x')), _UNSAFE, 'root'),
    'device in a layer': (
        _second(_T().device('etc/sda', tarfile.BLKTYPE, dev=(8, 0))),
        _UNSAFE, 'layer 2 of 2.*8:0'),
    'whiteout of overlay': (
        _second(_T().device('etc/passwd', dev=(0, 0))), _UNSAFE, '0:0'),
    'owner above 65535 in a layer': (
        _second(_T().add('f', uid=65536)), _UNSAFE, 'user id 65536'),
}
