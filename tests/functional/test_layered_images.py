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

"""Servers of images that are archives of container layers."""

from tests.functional import agents
from tests.functional import base
from tests import ocibad
from tests import ociimages


class LayeredImagesTest(base.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()

    def make_image(self, data, **values):
        return super().make_image(
            data, **{'container_format': 'docker'} | values)

    def parts(self):
        return ociimages.split_busybox(self.image_data())

    def test_server(self):
        server = self.boot(image=self.make_image(
            ociimages.oci(*self.parts())))
        self.wait_for(
            lambda: b'Start-up done' in self.agents.client(
                'host1').console_log(server['id']), 'its start-up script')
        done = self.agents.client('host1').exec(
            server['id'], ['/bin/sh', '-c', 'test ! -e /junk && echo fine'])
        self.assertEqual(b'fine\n', done['stdout'])
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.delete(server)
        self.assert_nothing_left()

    def test_what_is_wrong_is_in_the_fault(self):
        for data, texts in (
            (ocibad.BAD['encrypted layer'][0],
             ('layer sha256:', 'is encrypted', 'Save the image decrypted')),
            (ocibad.BAD['several in a Docker archive'][0],
             ('holds 2 images', 'Save one image alone')),
            (ocibad.BAD['another architecture'][0],
             ('is not for linux/', 'right architecture')),
            (ociimages.docker(*self.parts(), ociimages.tarballs.Tar(
                uid=0, gid=0).add('sbin/.wh.init')),
             ('the image has no init', 'pycontainer_init')),
        ):
            image = self.make_image(data)
            server = self.boot(image=image, status='ERROR')
            message = server['fault']['message']
            self.assertIn(image, message)
            for text in texts:
                self.assertIn(text, message)
            self.delete(server)
        self.assert_nothing_left()
