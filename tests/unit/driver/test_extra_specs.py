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

from nova.api.validation.extra_specs import validators
from nova import exception

from tests.unit.driver import base


class ExtraSpecsTest(base.TestCase):
    """As nova-api does it, which finds the driver's by their entry point."""

    def test_what_the_driver_has(self):
        for name, value in (
                ('pycontainer:pids_max', '64'),
                ('pycontainer:nesting', 'allowed'),
                ('pycontainer:nesting', 'enabled')):
            validators.validate(name, value)

    def test_what_it_has_not(self):
        for name, value in (
                ('pycontainer:pids_max', '63'),
                ('pycontainer:pids_max', 'many'),
                ('pycontainer:nesting', 'yes'),
                ('pycontainer:pids', '64')):
            self.assertRaises(exception.ValidationError,
                              validators.validate, name, value)
