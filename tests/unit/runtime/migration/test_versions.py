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

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer.runtime import state
from tests import cases


class VersionsTestCase(cases.TestCase):

    def other(self, **values):
        return versions.own() | {'hostname': 'other'} | values

    def former(self):
        other = self.other()
        del other['state_format']
        return other

    def refused(self, facts, role):
        error = self.assertRaises(
            errors.ContainerError, versions.check, facts, role)
        self.assertEqual('unsupported', error.code)
        return error

    def test_same_release(self):
        for role in ('source', 'destination'):
            self.assertIsNone(versions.of(self.other(), role))

    def test_former_release(self):
        self.assertIsNone(versions.of(self.former(), 'source'))
        error = self.refused(self.former(), 'destination')
        self.assertIn(f'in format {state.FORMAT}, other in format 3',
                      error.message)
        self.assertIn('on other first', error.remedy)

    def test_later_release(self):
        later = self.other(state_format=state.FORMAT + 1)
        self.assertIsNone(versions.of(later, 'destination'))
        error = self.refused(later, 'source')
        self.assertIn(f'other keeps instances in format {state.FORMAT + 1}',
                      error.message)
        self.assertNotIn('other', error.remedy)

    def test_other_protocol(self):
        for role in ('source', 'destination'):
            error = self.refused(self.other(protocol=0), role)
            self.assertIn('on other', error.remedy)

    def test_anything(self):
        for role in ('source', 'destination'):
            for value in (None, '4', [], True, {}):
                self.refused(self.other(state_format=value), role)
