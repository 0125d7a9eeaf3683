package engine

type connection struct{}
