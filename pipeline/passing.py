"""Errors that may be over at the next try, and say nothing of the file that they were met at.

Knows nothing of who meets them. Invariant: numbers, which FFmpeg and Python have from the system.
"""

import errno

OF_STORAGE = frozenset({errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT})
"""A mounted disk (NFS, FUSE) or a broken one does not give what it holds."""
OF_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""A process, or its machine, has no file handle or no memory left."""
