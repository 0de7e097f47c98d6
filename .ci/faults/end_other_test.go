//go:build !linux

package faults

import "syscall"

var endWithTests *syscall.SysProcAttr // other systems cannot
