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

"""How much data may go in one direction of an interface, see :mod:`.shaping`.
"""

import dataclasses

from nova_pycontainer.runtime import errors

#: What a 32 bit number of tc can say, in bytes per second (34 Gbit/s).
MAX = (1 << 32) - 1
#: Of a bucket tc keeps the time that it takes to fill, in 32 bits of 64 ns:
#: 274 seconds.
MAX_BURST_S = 256
_MIN = 1000


@dataclasses.dataclass(frozen=True)
class Rate:
    """The limit of one direction, as libvirt has it in ``<bandwidth>``.

    :param average: bytes per second in the long run
    :param peak: bytes per second at most, at any time; None: no such limit
    :param burst: bytes that may go beyond the average at a time; None: what
        the average is in 1/100 s
    """

    average: int
    peak: int | None = None
    burst: int | None = None

    @classmethod
    def from_dict(cls, data: object) -> 'Rate | None':
        """:raises ContainerError: ``invalid``"""
        if data is None:
            return None
        if not isinstance(data, dict) or set(data) - {
                field.name for field in dataclasses.fields(cls)}:
            raise _invalid(data)
        average = _number(data, 'average', _MIN, MAX)
        if average is None:
            raise _invalid(data)
        return cls(
            average, _number(data, 'peak', average, MAX),
            _number(data, 'burst', 1, min(average * MAX_BURST_S, MAX)))


def _number(
    data: dict[str, object], name: str, low: int, high: int
) -> int | None:
    value = data.get(name)
    if value is None:
        return None
    if (not isinstance(value, int) or isinstance(value, bool) or
            not low <= value <= high):
        raise _invalid(data)
    return value


def _invalid(data: object) -> errors.ContainerError:
    return errors.ContainerError(
        'invalid', f'the limit of an interface is not valid: {data!r}')
