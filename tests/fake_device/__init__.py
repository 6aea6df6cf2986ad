"""A fake accelerator: torch tensors of type `cuda` in host memory, on a machine without a GPU.

src/         the device in C++, against torch's public headers; its memory, streams and events are those of the
             simulated CUDA driver, so real comfy-aimdo works on it
build.py     compiles it
device.py    starts it in this process, and its controls
namespace.py what torch.cuda is from then on
on_device/   its tests, in processes of their own; test_fake_device.py starts them
"""
