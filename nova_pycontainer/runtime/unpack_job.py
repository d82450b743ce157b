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

"""What the process that unpacks is told, and what it says when it is done.

Apart from the rest, so that whoever starts that process need not load what it
takes to read an image.
"""

import dataclasses
import json
import typing as ty

from nova_pycontainer.runtime import archive


@dataclasses.dataclass(frozen=True)
class Job:
    """What the process is told, in one argument.

    :param root: empty directory to unpack into
    :param base: first host id of the range to run as
    :param max_bytes: disk space that the files may take
    """

    root: str
    base: int
    max_bytes: int
    limits: archive.Limits

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> 'Job':
        data = json.loads(text)
        return cls(**{**data, 'limits': archive.Limits(**data['limits'])})


class Result(ty.NamedTuple):
    entries: int
    bytes: int
    #: What was left out, and how often.
    notes: dict[str, int]
    #: Whether the root file system is the one directory in the root, and not
    #: the root itself.
    nested: bool = False
