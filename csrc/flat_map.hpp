// A hash table of 64-bit keys in one piece of memory: made in a few nanoseconds an entry, never shrunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpt {

class FlatMap {
 public:
  static constexpr std::uint32_t kNone = 0xffffffffu;

  explicit FlatMap(std::size_t expected = 0) { resize(expected); }

  std::size_t size() const { return count_; }

  // The value of a key; kNone where it is not there.
  std::uint32_t find(std::uint64_t key) const { return slots_[place(key)].value; }

  // Puts a value, other than kNone, where the key has none. Returns the one it has then.
  std::uint32_t put(std::uint64_t key, std::uint32_t value) {
    if (2 * count_ >= slots_.size()) resize(slots_.size());
    Slot& slot = slots_[place(key)];
    if (slot.value == kNone) {
      slot = {key, value};
      ++count_;
    }
    return slot.value;
  }

  template <class Visit>
  void for_each_key(Visit visit) const {
    for (const Slot& slot : slots_) {
      if (slot.value != kNone) visit(slot.key);
    }
  }

 private:
  struct Slot {
    std::uint64_t key;
    std::uint32_t value;
  };

  std::size_t place(std::uint64_t key) const {
    std::size_t at = ((key ^ (key >> 32)) * 0x9e3779b97f4a7c15u) >> shift_;
    while (slots_[at].value != kNone && slots_[at].key != key) at = (at + 1) & (slots_.size() - 1);
    return at;
  }

  void resize(std::size_t expected) {
    std::vector<Slot> old;
    old.swap(slots_);
    shift_ = 60;
    std::size_t size = 16;
    for (; size < 2 * expected; size *= 2) --shift_;
    slots_.assign(size, Slot{0, kNone});
    for (const Slot& slot : old) {
      if (slot.value != kNone) slots_[place(slot.key)] = slot;
    }
  }

  std::vector<Slot> slots_;
  std::size_t count_ = 0;
  unsigned shift_ = 60;
};

}  // namespace cpt
