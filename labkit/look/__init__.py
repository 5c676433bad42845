"""What a person looks at, as frozen facts: vCPUs, the VM, memory, walks, encryption, one page through two eyes."""
