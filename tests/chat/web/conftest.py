"""Files to upload: copies, since a page takes them over and deletes them."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.data import get_testdata_file

CT = Path(get_testdata_file("CT_small.dcm", download=False))


@pytest.fixture
def ct(tmp_path) -> str:
    folder = tmp_path / "ct"
    folder.mkdir()
    return shutil.copy(CT, folder)


@pytest.fixture
def png(tmp_path, scan) -> str:
    folder = tmp_path / "png"
    folder.mkdir()
    return shutil.copy(scan, folder)


@pytest.fixture
def volume(tmp_path) -> Path:
    """2,000 axial slices, the grey of each its own number."""
    values = np.broadcast_to(np.arange(2000, dtype=np.int16), (8, 9, 2000))
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values), np.eye(4)), path)
    return path


@contextmanager
def page_running(loaded, folder, **options):
    """The address of the page, over a real socket."""
    from moellava.chat.web.app import create_web_app
    from tests.chat.serving import app_running

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # so that it is what it was afterwards
        app = create_web_app(loaded, folder, name="toy", **options)
        with app_running(app, "critical") as address:
            yield address
