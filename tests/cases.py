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


"""What all tests that do not come from Nova's have in common."""

import os

import fixtures
import testtools


class TestCase(testtools.TestCase):
    """Fails a test that takes longer than OS_TEST_TIMEOUT seconds.

    As Nova's tests do; there is no limit without the variable.
    """

    def setUp(self):
        super().setUp()
        limit = int(os.environ.get('OS_TEST_TIMEOUT', 0))
        if limit:
            self.useFixture(fixtures.Timeout(limit, gentle=True))
