"""Everything that runs on the device. It never imports torch, the cloud or training code."""
