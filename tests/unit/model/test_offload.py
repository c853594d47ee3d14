"""Weights that were moved out can still be read, in rows, and come back as they were."""

import torch

from pmpo_megatron.model.offload import HostCopies


def test_rows_are_read_while_the_storage_is_empty():
    buffer = torch.arange(60.0)
    one, other = buffer[:12].view(3, 4), buffer[12:].view(6, 4, 2)
    expected = one.clone(), other.clone()
    copies = HostCopies(torch.device("cpu"))
    copies.move_out([one, other])
    assert buffer.untyped_storage().nbytes() == 0
    for first, count in ((0, 6), (2, 3), (5, 1)):
        assert torch.equal(copies.on_device(other, first, count), expected[1][first : first + count])
    assert torch.equal(copies.on_device(one, 1, 2), expected[0][1:3])
    copies.bring_back()
    copies.wait()
    assert torch.equal(one, expected[0]) and torch.equal(other, expected[1])
    assert copies.on_device(other, 2, 1).data_ptr() == other[2].data_ptr(), "what is here is not copied"
