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

import collections.abc
import os
import typing
import unittest

import fixtures
import testtools

_MORE = bool(os.environ.get('PYCONTAINER_TEST_MORE'))

#: Of a test that is one of many variants: all of them together would take
#: longer than anybody waits for a change.
more = unittest.skipUnless(
    _MORE,
    'a variant; PYCONTAINER_TEST_MORE=1 tools/run_tests.sh runs these, too')

_Variant = typing.TypeVar('_Variant')


def some(variants: collections.abc.Sequence[_Variant], *chosen: int
         ) -> list[_Variant]:
    """Those variants that one test goes through, all of them if asked to as
    for :data:`more`.

    :param chosen: which otherwise
    """
    return [*variants] if _MORE else [variants[n] for n in chosen]


class TestCase(testtools.TestCase):
    """Fails a test that takes longer than OS_TEST_TIMEOUT seconds.

    As Nova's tests do; there is no limit without the variable.
    """

    def setUp(self):
        super().setUp()
        limit = int(os.environ.get('OS_TEST_TIMEOUT', 0))
        if limit:
            self.useFixture(fixtures.Timeout(limit, gentle=True))
