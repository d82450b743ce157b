# Native threads are what nova-compute runs with; Nova's tests choose the
# concurrency backend when they are first imported.
import os

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', 'true')

import nova.tests.functional  # noqa: F401
