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

"""What of a guest does not fit on a destination, in words for the operator."""

import collections.abc as cabc
import contextlib
import socket

from nova_pycontainer.runtime import errors


@contextlib.contextmanager
def needed(what: str) -> cabc.Iterator[None]:
    """Let an error of a full disk say what did not fit, and where.

    It is read on the other host, or in Nova.
    """
    try:
        yield
    except errors.ContainerError as e:
        if e.code != 'no_space':
            raise
        raise errors.ContainerError(
            'no_space', f'{what} do not fit on {socket.gethostname()}',
            uuid=e.uuid, step=e.step, cause=e.cause or e.message,
            remedy=e.remedy) from e
