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

"""Waits until a server of the demo project has a status.

    wait_server.py NAME STATUS|gone SECONDS

The credentials come from the environment. Fails with the server's fault if
it gets into the status ERROR.
"""

import sys
import time

import openstack


def main(argv):
    name, wanted, limit = argv[1], argv[2], float(argv[3])
    compute = openstack.connect().compute
    server = compute.find_server(name, ignore_missing=wanted == 'gone')
    if server is None:
        return 0
    deadline = time.monotonic() + limit
    while True:
        try:
            found = compute.get_server(server.id)
        except openstack.exceptions.NotFoundException:
            if wanted == 'gone':
                return 0
            raise
        if found.status == wanted:
            return 0
        if found.status == 'ERROR':
            message = (found.fault or {}).get('message', 'no fault is given')
            print(f'server {name} is in status ERROR: {message}',
                  file=sys.stderr)
            return 1
        if time.monotonic() > deadline:
            print(f'after {limit:.0f} s server {name} has still the status '
                  f'{found.status} ({found.task_state}), not {wanted}',
                  file=sys.stderr)
            return 1
        time.sleep(0.2)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
