// Hashes for random numbers that are a function of where they are used. U is an unsigned integer or a vector of them, so that the lanes of a
// vector and a single number go through the same lines. No include guard: see csrc/cpu/every_isa.h.

namespace megapar::MEGAPAR_ISA {

// A permutation of 32-bit integers in which every input bit flips every output bit with probability near 1/2: the finaliser of
// MurmurHash3 (Appleby) with the constants that Wellons found (lowbias32, nullprogram.com/blog/2018/07/31).
template <class U>
static inline U mix32(U x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// The same for 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood 2014; Stafford's variant 13).
template <class U>
static inline U mix64(U x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace megapar::MEGAPAR_ISA
